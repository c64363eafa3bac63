import doctest
import importlib.util
import inspect
import re
import xml.etree.ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pages import NOT_RUN, PAGES, ROOT, Command, Shell, as_printed, blocks, is_run, parse

import minimax_jax as mj

README = ROOT / "README.md"
RUN_PAGES = [page for page in PAGES if any(map(is_run, blocks(page))) and page != README]
NEVER_RUN = 8
"""Most blocks of all pages that may be marked as not run."""

EXPLAINED = [
    *(getattr(mj, name) for name in ("from_hf", "to_hf", "source_scales", "convert", "plan", "inspect", "verify")),
    *(getattr(mj, name) for name in ("load", "load_model", "save_model", "read_tree", "quantize", "dequantize")),
    *(mj.BlockScaled, mj.nest, mj.flatten, mj.MiniMaxConfig, mj.synthesize),
]


@pytest.fixture
def shell(tmp_path, monkeypatch, pytestconfig):
    monkeypatch.chdir(tmp_path)
    return Shell(folder=tmp_path, cache=pytestconfig.cache.mkdir("xla"))


@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs_as_printed(page, shell):
    for example in parse(page, shell):
        example.evaluate()


def test_the_readme_runs_as_printed_with_its_python_in_one_new_session(shell):
    snippets = []
    for example in parse(README, shell):
        if example.region.lexemes["language"] == "python":
            snippets.append(example.parsed)
        else:
            example.evaluate()
    tests = f"import sys; sys.path.append({str(ROOT / 'tests')!r})"
    keep = f"{tests}; import compiled, jax; compiled.keep({str(shell.cache)!r})"
    for first, devices in (("", 1), (f'{keep}; jax.config.update("jax_num_cpu_devices", 8)', 8)):
        (shell.folder / "pasted.py").write_text("\n".join([first, *snippets, "print(mesh.size)"]))
        done = shell.run("rm -rf m2-trained && python pasted.py")
        assert (done.returncode, done.stdout) == (0, f"{devices}\n"), done.stderr


def test_few_blocks_are_not_run():
    marked = [region for page in PAGES for region in blocks(page) if NOT_RUN in region.lexemes["info"]]
    assert len(marked) <= NEVER_RUN


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_fence_of_a_page_is_a_block_of_a_known_language(page):
    fences = sum(line.lstrip().startswith("```") for line in page.read_text().splitlines())
    assert fences == 2 * len(blocks(page))
    assert {region.lexemes["language"] for region in blocks(page)} <= {"python", "console", "bash", "text"}


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("$ echo one\none\n$ echo two\n", None),
        ("$ echo one \\\n    two\none two\n", None),
        ("$ echo one; echo two\none\n...\n", None),
        ("$ echo one\ntwo\n", "got:\none"),
        ("$ false\n", "exit code 1"),
        ("$ echo error: bad\nerror: bad\n", "exit code 0"),
        ("$ echo error: bad >&2; exit 3\nerror: bad\n", None),
    ],
)
def test_a_console_block_that_is_not_as_printed_is_found(block, said, shell):
    failures = [failure for command in Command.all_of(block) if (failure := shell.failure(command))]
    assert bool(failures) == bool(said)
    assert said is None or said in failures[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_picture_of_a_page_is_there(page):
    named = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())
    assert [name for name in named if not (page.parent / name).is_file()] == []


def test_outputs_may_differ_in_space_at_the_ends_of_lines_alone():
    assert as_printed("a \nb\n", "a\nb")
    assert not as_printed("a b\n", "a  b\n")


def test_the_pictures_are_those_that_the_layout_table_gives():
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs/images/draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    assert {file.name for file in draw.FOLDER.glob("*.svg")} == draw.PICTURES.keys()
    for name, picture in draw.PICTURES.items():
        assert (draw.FOLDER / name).read_text() == picture()
        assert xml.etree.ElementTree.fromstring(picture()).tag.endswith("svg")


@pytest.mark.parametrize("thing", EXPLAINED, ids=lambda thing: thing.__qualname__)
def test_the_examples_of_a_docstring_give_what_they_say(thing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"mj": mj, "jax": jax, "jnp": jnp, "np": np}
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    (test,) = finder.find(thing, thing.__qualname__, module=inspect.getmodule(thing), globs=names)
    assert test.examples
    report = []
    runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
