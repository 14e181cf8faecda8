"""`drift-prior`: reasoning priors, from the alignment of two models to training."""

from typing import NoReturn

from drift_merge.cli import entry
from drift_merge.cli.entry import UnderRanks, lazy

TOGETHER, EACH = UnderRanks.TOGETHER, UnderRanks.EACH

_HELP = """Compute, check and use reasoning priors: delta = theta_reasoner - theta_mllm.

REASONER is a text LLM that reasons, or another fine-tuning of the same MLLM; MLLM is the
multimodal model. Each is a directory, a .safetensors file beside its config.json, or a Hub id
org/name[@revision].
"""

group = entry.group(
    "drift-prior",
    _HELP,
    {
        "Make": {
            "align": lazy("align", "align", "Say who is who in two models, from headers alone."),
            "compute": lazy(
                "compute", "compute", "Stream the prior to safetensors shards.", TOGETHER
            ),
            "compress": lazy("compress", "compress_command", "Store a prior in 8 bits.", TOGETHER),
            "extract-lora": lazy(
                "deriving.extract_lora", "extract_lora", "Write a prior as a LoRA adapter."
            ),
            "combine": lazy("deriving.combine", "combine", "Add up, negate or restrict priors."),
            "apply": lazy(
                "apply", "apply", "Add a prior to its MLLM: a complete checkpoint.", TOGETHER
            ),
            "train": lazy(
                "train", "train", "Fine-tune an MLLM, biased towards the reasoner.", EACH
            ),
        },
        "Look and check": {
            "inspect": lazy("inspect", "of_prior", "Show what a prior is made of."),
            "report": lazy("looking.report", "of_prior", "Write a page on a prior or a run."),
            "verify": lazy(
                "verify", "of_prior", "Read a prior again, and compute a sample anew.", TOGETHER
            ),
            "demo": lazy("demo", "demo", "Run the whole path on a tiny pair made on the spot."),
        },
        "Publish": {
            "push": lazy("push", "push_prior", "Send a prior to the Hugging Face Hub, privately."),
            "pull": lazy("pull", "pull_prior", "Fetch a prior from the Hub, verified."),
        },
        "Help": {
            "guide": lazy("guide", "guide_prior", "Show a page of the manual, or list its topics."),
            "doctor": lazy("doctor", "doctor", "Say what this machine and environment offer."),
        },
    },
)


def main() -> NoReturn:
    """Entry point of `drift-prior`."""
    entry.run(group, "drift-prior")
