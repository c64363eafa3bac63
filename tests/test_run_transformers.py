"""Checkpoints that transformers wrote, converted; and what we wrote, loaded by transformers."""

import functools
import logging

import folders
import pytest
import torch
import transformers
from nemo_oracle import differences

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.jobs.loading import how_to_load
from torch_bridge.arrays import to_torch

HIDDEN, INTER, EXPERTS = 256, 72, 5
"""transformers takes size / grid for the size of a block: sizes must be whole blocks, or less than one."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random model, as `save_pretrained` writes it in float32 and in bfloat16."""
    root = tmp_path_factory.mktemp("transformers")
    torch.manual_seed(0)
    model = transformers.MiniMaxM2ForCausalLM(
        transformers.MiniMaxM2Config(
            hidden_size=HIDDEN,
            intermediate_size=INTER,
            num_hidden_layers=2,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=20,
            vocab_size=99,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.05)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.e_score_correction_bias, std=0.05)
    model.save_pretrained(root / "f32")
    model.to(torch.bfloat16).save_pretrained(root / "bf16")
    return root


@functools.cache
def loaded(folder):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert {name: list(found) for name, found in report.items() if found} == {}
    return model.eval()


def logits(folder):
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        return loaded(folder)(ids).logits


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_what_transformers_saved_goes_to_native_and_back(saved, tmp_path, dtype):
    source = saved / dtype
    mj.convert(source, tmp_path / "native", dtype=dtype)
    mj.convert(tmp_path / "native", tmp_path / "back", to="hf", dtype=dtype)
    assert folders.stored(tmp_path / "back") == folders.stored(source)
    assert torch.equal(logits(tmp_path / "back"), logits(source))
    model = loaded(source)
    native = folders.arrays(tmp_path / "native")
    for number, layer in enumerate(model.model.layers):
        experts, name = layer.mlp.experts, f"model.layers.{number}.mlp.experts."
        gate_up = torch.tensor(native[name + "gate_and_up_projs"].astype("float32"))
        assert gate_up.shape == (EXPERTS, HIDDEN, 2 * INTER)
        assert torch.equal(gate_up.mT, experts.gate_up_proj)
        assert torch.equal(torch.tensor(native[name + "down_projs"].astype("float32")).mT, experts.down_proj)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_transformers_reads_our_fp8_as_we_do(saved, tmp_path, dtype):
    mj.convert(saved / dtype, tmp_path / "fp8", to="hf-fp8")
    mj.convert(tmp_path / "fp8", tmp_path / "f32", to="hf", dtype="f32")
    ours, original = logits(tmp_path / "f32"), logits(saved / dtype)
    assert torch.equal(logits(tmp_path / "fp8"), ours)
    model, quantised = loaded(saved / dtype), loaded(tmp_path / "fp8")
    for (name, was), got in zip(model.named_parameters(), quantised.parameters(), strict=True):
        # Half a step of e4m3 is 1/16 of a value, or 2**-10 of the scale, which is amax / 448.
        step = was.abs() / 16 + was.abs().amax() / 448 * 2.0**-10
        exact = "proj" not in name
        assert torch.equal(got, was) if exact else bool(((got - was).abs() <= step).all()), name
    assert (ours - original).abs().max() > 0


class Heard(logging.Handler):
    """What loggers say, of which pytest hears nothing: transformers' and the hub's do not hand on."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages, self._last = [], None

    def emit(self, record):
        if record is not self._last:  # where a logger was told to hand on, it comes from two
            self.messages.append(f"{record.name}: {record.getMessage()}")
        self._last = record


@pytest.fixture
def heard():
    handler, loggers = Heard(), [logging.getLogger(name) for name in ("", "transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    transformers.logging.warning_once.cache_clear()  # what was said before this test counts as well
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
    yield handler.messages
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def generates(folder, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False).shape[1] > 3


@pytest.mark.parametrize(("to", "dtype"), [("hf", "auto"), ("hf", torch.float32), ("hf-fp8", "auto")])
def test_outputs_are_loaded_without_a_warning(tmp_path, heard, to, dtype):
    synthetic.synthesize(tmp_path / "made")
    mj.convert(tmp_path / "made", tmp_path / "native")
    mj.convert(tmp_path / "native", tmp_path / "out", to=to)
    # Without a GPU transformers says that it will dequantise, unless it was told to.
    told = {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)} if to == "hf-fp8" else {}
    generates(tmp_path / "out", dtype=dtype, **told)
    assert heard == []
    folders.edit_json(tmp_path / "out" / "config.json", bos_token_id=10**6)
    generates(tmp_path / "out", dtype=dtype, **told)
    assert any("bos_token_id" in message for message in heard)  # so warnings are heard here


def test_with_a_gpu_our_lines_keep_every_bit_and_without_one_nothing_is_said_either(tmp_path, heard, monkeypatch):
    """A model that is loaded and not run needs no GPU: transformers only asks whether there is one."""
    synthetic.synthesize(tmp_path / "made")
    mj.convert(tmp_path / "made", tmp_path / "native")
    mj.convert(tmp_path / "native", tmp_path / "out", to="hf-fp8")
    mj.convert(tmp_path / "made", tmp_path / "by the module's names", to="transformers-v5", dtype="fp8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(transformers.MiniMaxM2ForCausalLM, "_keep_in_fp32_modules_strict", None)
    names, lines = dict[str, object](), how_to_load("hf-fp8", None, tmp_path / "out")
    exec("\n".join(lines), names)
    held = {key: to_torch(array.copy()) for key, array in folders.arrays(tmp_path / "by the module's names").items()}
    assert differences(names["model"].state_dict(), held) == []
    assert heard == []
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    exec(lines[-1].replace("dtype='auto', device_map='auto'", lines[-1].partition("without a GPU: ")[2]), names)
    assert {tensor.dtype for tensor in names["model"].state_dict().values()} == {torch.float32}
    assert heard == []


def test_of_fp8_transformers_says_what_it_says_of_the_published_form_and_no_more(tmp_path, heard):
    """On a CPU, that FP8 wants a GPU. Only a config that asks for bf16 everywhere (`dequantize`) would silence it."""
    synthetic.synthesize(tmp_path / "made")
    mj.convert(tmp_path / "made", tmp_path / "native")
    mj.convert(tmp_path / "native", tmp_path / "out", to="hf-fp8")
    said = []
    for name in ("made", "out"):
        transformers.logging.warning_once.cache_clear()
        generates(tmp_path / name, dtype="auto")
        said.append(tuple(heard))
        heard.clear()
    assert said[0] == said[1]
    assert (len(said[0]) == 1 and "requires a GPU" in said[0][0]) or torch.cuda.is_available()
