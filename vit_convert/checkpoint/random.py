"""`python -m vit_convert.checkpoint.random`, as older texts have it: see families/random.py, since a family writes its
own."""

import importlib
import sys

if __name__ == "__main__":
    sys.exit(importlib.import_module("vit_convert.families.random").main(sys.argv))
