"""Code that comes with a checkpoint is text: it is carried along, and never run."""

import json
import sys
from pathlib import Path

import folders
import pytest
from command_line import process

import minimax_jax as mj
from minimax_jax import synthetic

MARKER = "it-ran"
MODULES = ("configuration_minimax_m2", "modeling_minimax_m2", "tokenization_minimax_m2", "__init__")
AUTO_MAP = {
    "AutoConfig": "configuration_minimax_m2.MiniMaxM2Config",
    "AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM",
    "AutoTokenizer": ["tokenization_minimax_m2.Tokenizer", None],
}

CALLS = """
import sys
source, out, tests, cache = sys.argv[1:]
sys.path.append(tests)
import compiled
import minimax_jax as mj
from minimax_jax.models.smoke import smoke_test

compiled.keep(cache)
mj.MiniMaxConfig.from_pretrained(source)
mj.inspect(source), mj.plan(source), mj.read_tree(source), mj.load(source), mj.load_model(source)
for to, dtype in (("native", "bf16"), ("hf", "fp8"), ("transformers-v5", "bf16")):
    mj.convert(source, f"{out}/{to}", to=to, dtype=dtype)
mj.verify(source, f"{out}/native"), mj.diff(source, f"{out}/native"), mj.report(source, output=f"{out}/report.html")
smoke_test(f"{out}/native", prompts=[[1, 2]], max_new_tokens=1, temperature=0.0, seed=0, dtype="bf16")
"""


@pytest.fixture
def hostile(tmp_path):
    """A checkpoint that names code of its own, and brings it: whatever imports it leaves a file behind."""
    folder = tmp_path / "hf"
    synthetic.synthesize(folder, synthetic.config(experts=8))
    folders.edit_json(folder / "config.json", auto_map=AUTO_MAP)
    tokenizer = {"auto_map": AUTO_MAP, "tokenizer_class": "Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name in MODULES:
        leave = f"with open({str(tmp_path / MARKER)!r}, 'a') as file:\n    file.write({name!r})\n"
        (folder / f"{name}.py").write_text(leave)
    return folder


def test_the_code_would_leave_its_mark(hostile, tmp_path):
    for name in MODULES[:3]:
        done = process(sys.executable, "-c", f"import {name}", cwd=hostile)
        assert done.returncode == 0
    assert (tmp_path / MARKER).read_text() == "".join(MODULES[:3])


def test_transformers_would_run_it_when_it_is_trusted(hostile, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises((AttributeError, ImportError, ValueError)):
        transformers.AutoConfig.from_pretrained(hostile, trust_remote_code=True)
    assert (tmp_path / MARKER).exists()


def test_no_call_runs_it(hostile, tmp_path, pytestconfig):
    places = hostile, tmp_path / "out", Path(__file__).parent, pytestconfig.cache.mkdir("xla")
    done = process(sys.executable, "-c", CALLS, *places, cwd=hostile)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize("command", ["inspect", "plan", "verify", "report", "convert"])
def test_no_command_runs_it_not_even_from_inside_of_the_folder(hostile, tmp_path, command):
    script = Path(sys.executable).with_name("minimax-jax")
    more = {"report": ["-o", tmp_path / "report.html"], "convert": [tmp_path / "out"]}.get(command, [])
    done = process(sys.executable, script, command, ".", *more, cwd=hostile)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / MARKER).exists()


def test_it_is_carried_along_as_text(hostile, tmp_path):
    mj.convert(hostile, tmp_path / "out")
    there = folders.files(tmp_path / "out")
    assert json.loads(there["config.json"])["auto_map"] == AUTO_MAP
    for name in MODULES:
        assert there[f"{name}.py"] == (hostile / f"{name}.py").read_bytes()
    assert json.loads(there["tokenizer_config.json"])["auto_map"] == AUTO_MAP


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "consolidated.00.pth", "last.ckpt"])
def test_a_pickle_is_refused_in_words_by_every_call_and_never_opened(hostile, tmp_path, name):
    """The pickle would make a folder, were it loaded."""
    for file in [*hostile.glob("*.safetensors"), *hostile.glob("*.index.json")]:
        file.unlink()
    (hostile / name).write_bytes(b"cos\nmkdir\n(V" + str(tmp_path / MARKER).encode() + b"\ntR.")
    for call in (mj.inspect, mj.plan, mj.verify, mj.load, mj.load_model, mj.read_tree):
        with pytest.raises(mj.FormatError, match="never read, because unpickling runs code"):
            call(hostile)
    with pytest.raises(mj.FormatError, match="never read, because unpickling runs code"):
        mj.convert(hostile, tmp_path / "out")
    assert not (tmp_path / MARKER).exists() and not (tmp_path / "out").exists()
