"""What is not right yet, by architecture and column, with the reason; and what is not built."""

_INKLING = (
    "the mllm stores gate and up as one matrix of interleaved rows (w13), its text LLM as two:"
    " refused, and a map cannot say it"
)
_CSM = "refused: its decoder has no table of words, only one of sound"

REMAINING: dict[str, dict[str, str]] = {
    "csm": dict.fromkeys(("align", "compute", "merge", "attach"), _CSM),
    "inkling_mm_model": dict.fromkeys(("align", "compute", "merge", "attach"), _INKLING),
    "inkling2_loop": {"attach": "w13 of the experts lies otherwise in memory"},
}
SKIPPED: dict[str, str] = {
    "bark": "no decoder of language",
    "fastspeech2_conformer": "no decoder of language",
    "vits": "no decoder of language",
    "gradium_phonon_tts": "transformers cannot load what it saves",
    "nemo_speechlm": "transformers cannot load what it saves",
    "qwen2_5_omni": "wants a file of speakers beside the weights; its thinker has a row",
    "moonshine_streaming": "an encoder-decoder that the shrinking does not build",
    "speech-encoder-decoder": "an encoder-decoder that the shrinking does not build",
    "speecht5": "an encoder-decoder that the shrinking does not build",
}
