"""The kinds of image tokenizer, by name: `kind` in a recipe's `image_tokenizer`, and in every bundle."""

from typing import Any

from armchair.config import from_kind
from armchair.image.dvae import DVAE, DVAEConfig
from armchair.image.fsq import FSQ, FSQConfig
from armchair.image.network import ImageTokenizer
from armchair.image.vq import VQ, VQConfig

ImageTokenizerConfig = DVAEConfig | VQConfig | FSQConfig
IMAGE_TOKENIZER_CONFIGS: dict[str, type[ImageTokenizerConfig]] = {"dvae": DVAEConfig, "vq": VQConfig, "fsq": FSQConfig}


def image_tokenizer_config(data: Any, where: str = "") -> ImageTokenizerConfig:
    """From plain data, by its `kind`; a dVAE's where it says none. Raises RequestError as `config.from_dict` does."""
    return from_kind(tuple(IMAGE_TOKENIZER_CONFIGS.values()), data, where)


def make_image_tokenizer(config: ImageTokenizerConfig) -> ImageTokenizer:
    """A tokenizer with a random start, from the global generator."""
    match config:
        case DVAEConfig():
            return DVAE(config)
        case VQConfig():
            return VQ(config)
        case FSQConfig():
            return FSQ(config)
