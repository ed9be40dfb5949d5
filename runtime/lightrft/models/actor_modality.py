"""Which inputs an actor takes, under LightRFT's names."""

from enum import Enum


class ActorModality(Enum):
    """What an actor perceives beside text."""

    LANGUAGE_ONLY = "text"
    AUDIO_LANGUAGE = "audio"


MODALITY_PARAMETERS: dict[ActorModality, set[str]] = {
    ActorModality.LANGUAGE_ONLY: set(),
    ActorModality.AUDIO_LANGUAGE: {"audio_values", "image_grid_thw"},
}


def get_supported_parameters(modality: ActorModality) -> set[str]:
    """Names of the multimodal arguments that an actor's ``forward`` takes."""
    return MODALITY_PARAMETERS[modality]
