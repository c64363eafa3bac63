"""One process of two that save a model together; one of them may fail. Prints how it ended.

python export_process.py ADDRESS PROCESS SOURCE DESTINATION KIND VICTIM COUNT    # COUNT 0: nobody fails
"""

import sys

import jax
from jax.sharding import AxisType

import minimax_jax as mj
from minimax_jax.io.writer import Writer
from minimax_jax.jobs import orbax
from minimax_jax.models import export


def main(address, process, source, destination, kind, victim, count):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, process)
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,))
    if count and process == victim:
        fail(count)
    model = mj.load_model(source, mesh=mesh)
    native = mj.load(source, mesh=mesh)
    try:
        if kind == "hf":
            mj.save_model(model, destination)
        else:
            orbax.save(native, model.config, destination)
        print("good")
    except (mj.CheckpointError, KeyboardInterrupt, OSError) as error:
        print(type(error).__name__)


def fail(count):
    """In the process that writes at a write, in the other one behind its part in fetching a piece."""
    left = [count]

    def counted(call, error):
        def counting(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                raise error
            return call(*arguments, **options)

        return counting

    Writer.write = counted(Writer.write, OSError("gone"))
    export._Leaf.pieces = _stopping(export._Leaf.pieces, left) if jax.process_index() else export._Leaf.pieces
    orbax.write_json_atomic = counted(orbax.write_json_atomic, KeyboardInterrupt())


def _stopping(pieces, left):
    def stopping(leaf):
        for piece in pieces(leaf):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            yield piece

    return stopping


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:6], *map(int, sys.argv[6:8]))
