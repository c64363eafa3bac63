"""Coverage-guided fuzzing of the parsers, by atheris: `fuzz_parsers.py TARGET CORPUS... [-max_total_time=60]`.

What is found to reach new code is written to the first folder; an input that breaks a promise, to the current folder.
"""

import sys
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

with atheris.instrument_imports(include=["minimax_jax"]):
    import fuzz_targets


def main() -> None:
    """Run libFuzzer on one target; options behind it are libFuzzer's own."""
    if len(sys.argv) < 2 or sys.argv[1] not in fuzz_targets.TARGETS:
        sys.exit(f"usage: fuzz_parsers.py {{{','.join(fuzz_targets.TARGETS)}}} [CORPUS...] [-option=value...]")
    target = fuzz_targets.TARGETS[sys.argv.pop(1)]

    def once(content: bytes) -> None:
        target(content)

    atheris.Setup(sys.argv, once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
