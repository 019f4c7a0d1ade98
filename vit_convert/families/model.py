"""What a family gives the exporter, under the name by which families written for earlier versions import it."""

from vit_convert.core.model import Arrays, Model

__all__ = ["Arrays", "Model"]
