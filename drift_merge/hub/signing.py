"""A signature over the files of a push, in the form of model-signing: anybody may check it.

Signed are the names and SHA-256 of all that is sent, those that are compared with the Hub at the
end. A signature says who published, never that it is harmless.
Format: https://github.com/sigstore/model-transparency
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from drift_merge.errors import RecipeError, SourceError
from drift_merge.hub.files import LAST, SIGNATURE, PushFile

KEYLESS = "sigstore"
PASSWORD = "DRIFT_MERGE_SIGN_PASSWORD"  # of an encrypted key

Signer = Callable[[str, Sequence[PushFile]], PushFile]  # what it is called, what is signed


@dataclass(frozen=True, slots=True)
class _Hashes:
    """Takes the place of model-signing's own walk through a folder: all is hashed already."""

    manifest: Any

    def hash(self, _: object) -> Any:
        """The names and hashes."""
        return self.manifest


def signer(key: str) -> Signer:
    """What signs a push; the key is read now.

    Args:
        key: a PEM file of an EC private key (P-256, P-384, P-521), or "sigstore": by an account
            of yours, with a browser, through sigstore's public servers.

    Raises:
        RecipeError: model-signing is not installed, or the key is of another kind.
        SourceError: there is no such file.
    """
    try:
        signing: Any = import_module("model_signing.signing")
    except ImportError as error:
        raise RecipeError(
            f"--sign needs model-signing, which cannot be imported: {error}.",
            remedy="Install it with: pip install 'drift_merge[sign]'",
        ) from error
    config = signing.Config()
    if key == KEYLESS:
        config.use_sigstore_signer()
    else:
        _use_key(config, Path(key).expanduser())

    def sign(name: str, files: Sequence[PushFile]) -> PushFile:
        config.set_hashing_config(_Hashes(_manifest(name, files)))
        with tempfile.TemporaryDirectory(prefix="drift-sign-") as folder:
            path = Path(folder, SIGNATURE)
            config.sign(folder, path)
            return PushFile(SIGNATURE, path.read_bytes(), LAST)

    return sign


def _use_key(config: Any, key: Path) -> None:
    password = os.environ.get(PASSWORD)
    try:
        config.use_elliptic_key_signer(
            private_key=key, password=None if password is None else password.encode()
        )
    except OSError as error:
        raise SourceError(
            f"--sign {key} cannot be read: {error.strerror or error}.",
            remedy="Name a private key, or make one: "
            f"openssl ecparam -name prime256v1 -genkey -noout -out {key.name}",
        ) from error
    except (ValueError, TypeError, AttributeError) as error:  # by what cryptography finds in it
        raise RecipeError(
            f"--sign {key} is no key that can sign: {error}",
            remedy="Give a private key in PEM on P-256, P-384 or P-521; the password of an "
            f"encrypted one is taken from {PASSWORD}.",
        ) from error


def _manifest(name: str, files: Sequence[PushFile]) -> Any:
    manifest: Any = import_module("model_signing.manifest")
    digest: Any = import_module("model_signing._hashing.hashing").Digest
    kind = manifest.SerializationType.from_args(
        {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": False,
            "ignore_paths": [SIGNATURE],
        }
    )
    items = [kind.new_item(f.name, digest("sha256", bytes.fromhex(f.sha256))) for f in files]
    return manifest.Manifest(name, items, kind)
