"""Each remedy that is pasted, and why the others are not."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests import checkpoints as c
from tests.faults.remedies.provoked import (
    UP,
    Words,
    align,
    base_of_other_names,
    compute,
    decoders,
    doubled,
    existing,
    existing_merge,
    mapped,
    merge,
    moved,
    no_merge,
    no_prior,
    other_shards,
    pickled,
    prior_as_source,
    recipe,
    recompressed,
    swapped,
    swept,
    torn,
    twins,
    two_shards,
    without_base,
)


@dataclass(frozen=True)
class Row:
    """One remedy."""

    file: str  # where it stands in the package
    says: str  # a part of its text there
    provoke: Callable[[Path], Words]  # makes the inputs; the command that is refused
    pasted: str  # a regular expression: the text of the remedy that is pasted
    code: int = 0  # of what is pasted
    then: int | None = 0  # of the first command, if a whole command was pasted; None: not run


MAP = r"--map:\n(.*?)(?:\nOtherwise|\Z)"


ROWS = [
    Row(
        "names/refusals.py",
        "See the canonical names with",
        lambda t: align(t, "--modules", "re:nothing"),
        r"drift-prior align .* -v",
        0,
        None,
    ),
    Row("names/refusals.py", "{_remedy(alignment)}", torn, r"--on-mismatch skip"),
    Row("names/refusals.py", "{_remedy(alignment)}", torn, r"drift-prior align .* -v", 4, None),
    Row("names/refusals.py", "{_remedy(alignment)}", torn, r"drift-prior guide layouts", 0, None),
    Row(
        "names/refusals.py",
        "{_remedy(alignment)}",
        lambda t: moved(t, ".self_attn.k_proj", ".att.k_proj"),
        MAP,
    ),
    Row(
        "names/refusals.py",
        "{_remedy(alignment)}",
        lambda t: moved(t, "layers", "layers.0.layers"),
        r"drift-prior align .* --json",
        4,
        None,
    ),
    Row("names/align.py", "drift-prior align ", swapped, r"drift-prior align .*", 0, None),
    Row("names/align.py", "drift-prior guide layouts", decoders, MAP),
    Row("names/towers.py", "Say which one", twins, MAP),
    Row(
        "names/towers.py",
        "drift-prior guide layouts",
        lambda t: moved(t, "embed_tokens", "tokens_table_of_mine"),
        MAP,
    ),
    Row("names/naming.py", "Leave one of them out", doubled, MAP),
    Row(
        "names/embeddings.py",
        "Leave them out",
        lambda t: align(t, "--modules", "full"),
        r"--modules attn,mlp,norm",
    ),
    Row(
        "names/layers/promises.py",
        "out of --modules, or take",
        lambda t: align(t, "--modules", "attn,mixer"),
        r"drift-prior align REASONER MLLM -v",
        0,
        None,
    ),
    Row(
        "names/modules.py",
        "half-open ranges",
        lambda t: align(t, "--layers", "a"),
        r"--layers 0:28",
    ),
    Row(
        "names/lineage.py",
        "or pass --modules mlp",
        lambda t: compute(t, reasoner_config={"num_attention_heads": 8, "num_key_value_heads": 4}),
        r"--modules mlp",
    ),
    Row(
        "engine/nonfinite.py",
        "--allow-nonfinite",
        lambda t: compute(t, mllm={UP: c.store([[float("nan")] * c.HIDDEN] * c.INTERMEDIATE)}),
        r"--allow-nonfinite",
    ),
    Row("storage/outputs/existing.py", "--overwrite=any", existing, r"--overwrite=any"),
    Row("storage/outputs/existing.py", "add --overwrite", existing_merge, r"--overwrite"),
    Row(
        "recipes/method_rules.py",
        "Add one, such as --rank 1",
        lambda t: merge(t, "linear", "--norm", "nuclear"),
        r"--rank 1",
    ),
    Row(
        "recipes/method_rules.py",
        "Add --calibrate svc",
        lambda t: merge(t, "ties", "--calibrate-alpha", "0.2", "--base", str(t / "reasoner")),
        r"--calibrate svc",
    ),
    Row(
        "plans/merge.py",
        "Select attention or MLP",
        lambda t: merge(t, "linear", "--rank", "1", "--modules", "norm"),
        r"--modules attn,mlp",
    ),
    Row(
        "recipes/method_rules.py",
        "Name the common ancestor",
        lambda t: merge(t, "ties"),
        r"--base BASE",
    ),
    Row(
        "recipes/method_rules.py",
        "Leave --base out",
        lambda t: recipe(t, f"method: linear\nbase: {t}\n"),
        r"drift-merge methods",
        0,
        None,
    ),
    Row(
        "recipes/method_rules.py",
        "Write: drift-merge",
        lambda t: merge(t, "linear", "--weight", "frank"),
        r"drift-merge \S+ \.\.\. --base BASE --weight frank",
        0,
        None,
    ),
    Row(
        "recipes/recipe.py",
        "See them all",
        lambda t: recipe(t, "method: linaer\n"),
        r"drift-merge methods",
        0,
        None,
    ),
    Row("recipes/sweep.py", "Write --set", swept, r"--set weight=0\.05:0\.5:0\.05"),
    Row("priors/manifest.py", "Make one with", no_prior, r"drift-prior compute .* -o PRIOR"),
    Row("merges/manifest.py", "Make one with", no_merge, r"drift-merge linear .* -o OUT"),
    Row(
        "priors/compress.py",
        "compute it again",
        recompressed,
        r"drift-prior compute .* -o OUT",
        0,
        None,
    ),
    Row("priors/manifest.py", "after a look", other_shards, r"drift-prior verify .*", 1, None),
    Row(
        "plans/prior.py",
        "Compare their names",
        base_of_other_names,
        r"drift-prior align BASE MLLM --json",
        4,
        None,
    ),
    Row(
        "plans/merge.py",
        "--no-normalize",
        lambda t: merge(
            t, "linear", "--variant", "mergekit", "--weight", "-1", "--mllm-weight", "1"
        ),
        r"--no-normalize",
    ),
    Row(
        "recipes/method_rules.py",
        "add: --variant",
        lambda t: recipe(t, "method: linear\nweight: 0.3\nvariant: paper\nnormalize: false\n"),
        r"--variant mergekit",
    ),
    Row(
        "recipes/stored_rules.py",
        "or compress: --dtype",
        lambda t: compute(t, "--through", "bfloat16"),
        r"--dtype float8_e4m3fn",
    ),
    Row(
        "recipes/stored_rules.py",
        "Add --rank 16",
        lambda t: compute(t, "--norm", "nuclear"),
        r"--rank 16",
    ),
    Row("recipes/remade.py", "Give that file: --map", mapped, r"--map .*names\.yaml"),
    Row("storage/folder/faults.py", "_TAKE_OUT", two_shards, r"python -c .*"),
    Row("recipes/sources.py", "Write where its base is", without_base, r"python -c .*"),
    Row(
        "storage/weight_map.py",
        "Look at it with",
        prior_as_source,
        r"drift-prior inspect .*",
        0,
        None,
    ),
    Row("storage/weight_map.py", "_CONVERT", pickled, r"python -c .*"),
    Row(
        "cli/running.py",
        "--device cpu",
        lambda t: compute(t, "--device", "cuda:99"),
        r"--device cpu",
    ),
    Row(
        "cli/entry.py",
        "See: {} --help",
        lambda t: ["drift-prior", "aling"],
        r"drift-prior --help",
        0,
        None,
    ),
]


# (file or folder, a part of the text; "" for all there) -> why it is not run here
NOT_RUN = {
    (
        "training/",
        "",
    ): "a change of the user's own training program; tests/training refuse and go on",
    ("trainers/", ""): "a change of the user's own training program; tests/real_trainers run them",
    (
        "cli/commands/looking/report.py",
        "See what its best",
    ): "asks for the mllm; tests/cli/test_looking run the command",
    ("cli/commands/train.py", ""): "trains; tests/real_trainers run it",
    ("hub/", ""): "needs a token or the network; tests/hub run each against a server of their own",
    ("storage/hub/", ""): "needs the network; tests/storage/hub and tests/streaming refuse it",
    ("engine/downloads.py", ""): "needs the network; tests/streaming run --cache-limit",
    ("plans/transfers.py", ""): "needs the network; tests/streaming run --cache-limit",
    ("merges/make.py", ""): "needs the network; tests/streaming run both ways",
    ("engine/workers.py", ""): "a worker that the system killed; tests/engine run it",
    ("recipes/own_methods.py", ""): "a change of the user's own file; tests/merges run it",
    ("maths/methods/own.py", ""): "a change of the user's own file; tests/merges run it",
    ("recipes/remade.py", "--methods FILE"): "the user's own file; tests/merges run it",
    ("recipes/values.py", ""): "the command is that of recipes/recipe.py",
    ("recipes/unwrap.py", ""): "PEFT does it, in Python",
    ("recipes/stored_rules.py", "--round"): "two changes at once: one option less, another more",
    ("recipes/method_rules.py", "--weight frank"): "takes the place of the weights that are given",
    ("priors/combine.py", ""): "options and priors of the user's own; tests/priors refuse each",
    ("priors/verify.py", "each prior with its own"): "a command with fewer options",
    ("plans/gates.py", ""): "names modules of the user's own file",
    ("priors/manifest.py", "with this version"): "of a prior that a version before us wrote",
    ("cli/commands/evaluating/", ""): "the user's own evaluation; tests/evaluation refuse it",
    ("evaluation/", ""): "the user's own evaluation; tests/evaluation refuse it",
    ("searches/", ""): "the user's own evaluation, or optuna; tests/searches refuse it",
    ("reports/", ""): "a page, its name, or a package; tests/reports refuse it",
    ("storage/outputs/lock.py", ""): "needs a file system without locks",
    ("recipes/sweep.py", "in one --set"): "a command with fewer options",
    ("storage/adapters/", ""): "PEFT does it; tests/real_trainers/lora run merge_by_peft",
    ("plans/views.py", "merge_by_peft"): "PEFT does it; tests/real_trainers/lora run it",
    ("plans/views.py", "uncompressed"): "a name that no tensor of a known model has",
    ("names/tokens/formats.py", ""): "installs a package",
    ("names/tokens/files.py", ""): "only looks at a file, or needs git-lfs",
    ("names/embeddings.py", "pip install"): "installs a package; the rest is the other row's",
    ("storage/manifests.py", ""): "installs a package",
    ("storage/folder/faults.py", "ls -lL"): "only looks at a file",
    ("storage/folder/faults.py", "git lfs"): "needs git-lfs and the network",
    (
        "storage/folder/faults.py",
        "too_many_files_remedy",
    ): "ulimit; tests/faults/inputs run it",
    ("storage/shards.py", ""): "ulimit, or looks at a folder of another user",
    ("storage/sources.py", "ls -l"): "only looks at a file",
    ("storage/weight_map.py", "merge_and_unload"): "tests/real_trainers/lora merge with PEFT",
    ("storage/checkpoint.py", "Make one with"): "the command is that of priors/manifest.py",
    ("priors/deltas.py", ""): "of the Python face; the command is run in tests/cli",
    ("priors/compress.py", "without --allow-nonfinite"): "other checkpoints: nothing to paste",
    ("names/refusals.py", "--on-mismatch error"): "of the Python face: click refuses it first",
    ("names/account.py", ""): "leaves a word out, or names a file that the user writes",
    ("names/lineage.py", "Pass --modules attn"): "of a warning, which stops nothing",
    ("names/lineage.py", "or pass --modules attn"): "the row of --modules mlp, the other way round",
    ("names/lineage.py", "--modules has embed"): "nothing to do",
    ("names/lineage.py", "Leave head out"): "leaves a word out of an option",
    ("names/layers/promises.py", "otherwise add"): "an addition to the user's own list of words",
    ("names/pairing.py", ""): "names a file that the user writes",
    ("names/advice/rotary.py", ""): "of warnings, which stop nothing; tests/names/advice run it",
}
