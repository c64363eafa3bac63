"""NeMo's own checkpointing of its MiniMax-M2 model, with our adapter in the place of NeMo's; its LoRA beside PEFT."""

import json
import warnings

import folders
import pytest
import torch
from helpers import config, random_hf
from nemo_oracle import MiniMaxM2StateDictAdapter, checkpoint, differences
from safetensors.torch import save_file
from torch_modules import SIZES, build, load, logits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers
    from nemo_automodel.components._peft.lora import PeftConfig, apply_lora_to_linear_modules
    from nemo_automodel.components.checkpoint import addons, checkpointing
    from nemo_automodel.components.checkpoint.stateful_wrappers import ModelState

LORA = PeftConfig(target_modules=["*q_proj", "*experts*"], dim=4, alpha=8)
FORMS = [{}, {"legacy_paramwrapper_layout": True}, {"v4_compatible": True}]


@pytest.fixture(scope="module")
def cfg():
    return config(**SIZES)


@pytest.fixture(scope="module")
def both(cfg):
    """NeMo's model with our adapter, and with its own, on the same FP8 checkpoint."""
    return [load(build(cfg, adapter), checkpoint(cfg)) for adapter in (MiniMaxM2StateDictAdapter, None)]


def with_lora(model, seed):
    """The model with random LoRA, of which neither factor is zero."""
    apply_lora_to_linear_modules(model, LORA)
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2, generator=random)
    return model


@pytest.fixture(scope="module")
def both_with_lora(cfg):
    return [with_lora(load(build(cfg, a), checkpoint(cfg)), 0) for a in (MiniMaxM2StateDictAdapter, None)]


def written(model, *, is_peft=False, **how):
    state = ModelState(model, is_peft=is_peft).state_dict()
    return checkpointing._maybe_adapt_state_dict_to_hf(model, state, **how)


def read_into(model, hf, *, is_peft=False, hint=None):
    native = checkpointing._maybe_adapt_state_dict_from_hf(model, dict(hf), paramwrapper_layout_hint=hint)
    ModelState(model, is_peft=is_peft).load_state_dict(native, strict=not is_peft, broadcast_from_rank0=False)
    return model


def test_nemo_writes_and_reads_the_model_as_with_its_own_adapter(cfg, both):
    hf, want = map(written, both)
    assert differences(hf, want) == []
    fp8 = [written(model, quantization=True) for model in both]
    assert list(fp8[0]) == list(fp8[1])
    again = read_into(build(cfg, MiniMaxM2StateDictAdapter), hf)
    assert differences(again.state_dict(), both[1].state_dict()) == []
    assert torch.equal(logits(again), logits(both[1]))


@pytest.mark.parametrize("form", FORMS)
def test_nemo_writes_and_reads_lora_as_with_its_own_adapter(cfg, both_with_lora, form):
    hf, want = (written(model, is_peft=True, **form) for model in both_with_lora)
    assert differences(hf, want) == [] and list(hf) == list(want)
    nemos = both_with_lora[1]
    v4_compatible, legacy = (name in form for name in ("v4_compatible", "legacy_paramwrapper_layout"))
    settings, stamp = [], []
    for model in both_with_lora:
        settings.append(addons._get_hf_peft_config(LORA, ModelState(model, is_peft=True), v4_compatible))
        stamp.append(addons._get_paramwrapper_layout_stamp(model.state_dict_adapter, v4_compatible, legacy))
    assert settings[0] == settings[1] and stamp[0] == stamp[1]
    again = with_lora(load(build(cfg, MiniMaxM2StateDictAdapter), checkpoint(cfg)), 1)
    assert not torch.equal(logits(again), logits(nemos))
    assert torch.equal(logits(read_into(again, hf, is_peft=True, hint=stamp[0])), logits(nemos))


def test_lora_of_nemos_model_has_the_same_logits_in_peft(cfg, both_with_lora, tmp_path):
    folders.write(tmp_path / "fp8", random_hf(cfg), cfg)
    model = both_with_lora[0]
    (tmp_path / "lora").mkdir()
    settings = addons._get_hf_peft_config(LORA, ModelState(model, is_peft=True))
    settings["base_model_name_or_path"] = str(tmp_path / "fp8")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    save_file(written(model, is_peft=True), tmp_path / "lora" / "adapter_model.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "lora").eval()
    got, want = logits(model), logits(adapted)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))
    with adapted.disable_adapter():
        assert not torch.allclose(logits(adapted), want, atol=1e-2)
