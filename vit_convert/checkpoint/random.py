"""The old name of `python -m vit_convert.families.random`."""

from vit_convert.core.renamed import run_program

if __name__ == "__main__":
    run_program("vit_convert.checkpoint.random")
