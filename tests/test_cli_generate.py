import jax.numpy as jnp
import pytest
from command_line import run, run_json

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.models.generate import generate
from minimax_jax.models.minimax import MiniMaxForCausalLM


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


@pytest.mark.parametrize("ids,code", [("1,b", 2), ("99999", 3), ("", 3)])
def test_impossible_prompts_are_refused(made, ids, code):
    _, stderr = run("generate", made / "hf", "--prompt-ids", ids, "-q", code=code)
    assert "Traceback" not in stderr and ("token ids" in stderr or "prompts" in stderr or "vocabulary" in stderr)
