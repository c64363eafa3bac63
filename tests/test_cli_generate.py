import jax.numpy as jnp
import pytest
from command_line import run, run_json

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.models.generate import generate
from minimax_jax.models.minimax import MiniMaxForCausalLM
from minimax_jax.models.smoke import smoke_test


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    synthetic.synthesize(folder / "hf", synthetic.config(experts=8))
    mj.convert(folder / "hf", folder / "native", dtype="fp8")
    return folder


def greedy(path, prompt, *, dtype):
    """The same prompt by itself, through the pure functions and a model that is neither sharded nor stacked."""
    config = mj.MiniMaxConfig.from_pretrained(path)
    native = mj.from_hf(mj.read_tree(path), config, dtype=dtype)
    model = MiniMaxForCausalLM(config, native, dtype=jnp.float32)
    return generate(model, jnp.array([prompt]), max_new_tokens=5).tokens.tolist()[0]


def test_prompts_of_different_lengths_go_on_as_each_does_alone(made):
    expected = [greedy(made / "hf", prompt, dtype=jnp.float32) for prompt in ([1, 2, 3], [7, 8, 9, 10, 11])]
    options = ("--prompt-ids", "1,2,3", "--prompt-ids", "7 8 9 10 11", "--max-new-tokens", "5", "-q")
    told, _ = run_json("generate", made / "hf", "--dtype", "f32", *options)
    assert told == {"tokens": expected}


def test_both_layouts_say_the_same_in_plain_lines(made):
    options = ("--prompt-ids", "1,2,3", "--max-new-tokens", "5", "-q")
    stdout, _ = run("generate", made / "hf", *options)
    assert run("generate", made / "native", *options)[0] == stdout and len(stdout.split(",")) == 5


def test_sampling_depends_on_the_seed_alone(made):
    options = ("--prompt-ids", "1,2,3", "--max-new-tokens", "12", "--temperature", "3", "-q")
    first, again, other = (run("generate", made / "hf", *options, "--seed", seed)[0] for seed in ("1", "1", "2"))
    assert first == again != other


@pytest.mark.parametrize("ids", ["1,b", "", " ", "1,,2", "1,", "-1", "1.5", "1_0", "\u0661", str(10**12), "9" * 5000])
def test_what_is_no_list_of_ids_is_usage(made, ids):
    _, stderr = run("generate", made / "none", "--prompt-ids", ids, "-q", code=2)
    assert "is not a list of token ids such as 1,2,3" in stderr and "Traceback" not in stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt-ids", "1,264,999999999"], "got: 264, 999999999\n"),
        (["--prompt-ids", "1", "--max-new-tokens", "512"], "max_new_tokens"),
        (["--prompt-ids", "1", "--temperature", "nan"], "temperature"),
    ],
)
def test_what_this_model_cannot_take_is_told(made, options, said):
    _, stderr = run("generate", made / "hf", *options, code=3)
    assert stderr.count("error: ") == 1 and said in stderr and "Traceback" not in stderr


@pytest.mark.parametrize("prompts", [[[1], [264]], [[2**40]], [[1], []], []])
def test_prompts_are_looked_at_before_the_weights(made, prompts):
    moments = []
    with pytest.raises(mj.JobError):
        smoke_test(made / "hf", prompts=prompts, progress=moments.append)
    assert moments == []
    smoke_test(made / "hf", prompts=[[1, 2, 3]], max_new_tokens=5, progress=moments.append)  # compiled above
    assert moments
