"""What tests of calibration on transformers models share."""

import json
import sys
import warnings


def lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def import_transformers():
    """A torchvision built for another torch keeps transformers from importing text models: then do without it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError):
            for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
            sys.modules["torchvision"] = None
        from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
    return BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
