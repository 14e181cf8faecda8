"""`push --sign`: what model-signing itself says of what comes from the Hub."""

import subprocess
import sys
from pathlib import Path

import pytest

from drift_merge.hub import signing
from drift_merge.hub.files import SIGNATURE
from tests.faults.harness import assert_refusal, run
from tests.hub.places import MERGED, REPO, files_at, shards_of

NEEDED = "the extra `sign` is not installed"


@pytest.fixture
def keys(tmp_path):
    """A private key on P-256 and its public one; another public one."""
    pytest.importorskip("model_signing.signing", reason=NEEDED)
    return {name: make_key(tmp_path / name) for name in ("own", "other")}


def make_key(path, password=None):
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    lock = s.BestAvailableEncryption(password) if password else s.NoEncryption()
    pem = private.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, lock)
    public = private.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pem").write_bytes(pem)
    path.with_suffix(".pub").write_bytes(public)
    return path


def push(directory, key, repo_id=REPO, program="drift-prior"):
    result = run(program, "push", str(directory), repo_id, "--sign", str(key))
    assert result.code == 0, result


def check(directory, public, *more):
    """The command of the guide: its exit code."""
    words = ["verify", "key", str(directory), *more]
    words += ["--signature", str(Path(directory, SIGNATURE)), "--public_key", f"{public}.pub"]
    done = subprocess.run([sys.executable, "-m", "model_signing", *words], check=False, timeout=60)
    return done.returncode


def verify(directory, public):
    """The same in this process; raises where it does not hold."""
    import model_signing.verifying

    config = model_signing.verifying.Config()
    config.use_elliptic_key_verifier(public_key=Path(f"{public}.pub"))
    config.verify(directory, Path(directory, SIGNATURE))


def test_what_is_signed_pushed_and_pulled_verifies_with_the_public_key_alone(hub, own, keys):
    own.prior.joinpath("prior.png").write_bytes(b"a picture")
    push(own.prior, f"{keys['own']}.pem")
    assert run("drift-prior", "pull", REPO, "-o", "here").code == 0
    assert check("here", keys["own"]) == 0
    with pytest.raises(ValueError, match="Key mismatch"):
        verify("here", keys["other"])
    for name in ("prior.json", "README.md", "prior.png", *shards_of(own.prior)):
        path = Path("here", name)
        kept = path.read_bytes()
        path.write_bytes(kept[:-1] + b"?")
        with pytest.raises(ValueError, match=f"Hash mismatch.*{name}"):
            verify("here", keys["own"])
        path.write_bytes(kept)
    Path("here", "more.py").write_text("print('code')")
    with pytest.raises(ValueError, match=r"Extra files.*more\.py"):
        verify("here", keys["own"])
    assert check("here", keys["own"]) != 0


def test_a_merge_with_its_sidecars_verifies_and_a_whole_download_does_too(hub, built, keys):
    from huggingface_hub import snapshot_download

    push(built.merged, f"{keys['own']}.pem", MERGED, "drift-merge")
    assert run("drift-merge", "pull", MERGED, "-o", "here").code == 0
    verify("here", keys["own"])
    assert run("drift-merge", "verify", "here").code == 0
    snapshot_download(MERGED, local_dir="there")  # with a folder .cache of the client's
    assert check("there", keys["own"], "--ignore-paths", "there/.cache") == 0


def test_a_push_without_sign_takes_away_a_signature_that_would_no_longer_hold(hub, own, keys):
    push(own.prior, f"{keys['own']}.pem")
    assert SIGNATURE in files_at(hub)
    assert run("drift-prior", "push", str(own.prior), REPO).code == 0
    assert SIGNATURE in files_at(hub)  # nothing was sent
    card = own.folder / "card.md"
    card.write_text("Mine.\n")
    assert run("drift-prior", "push", str(own.prior), REPO, "--card", str(card)).code == 0
    assert SIGNATURE not in files_at(hub)


def test_an_encrypted_key_takes_its_password_from_the_environment(hub, built, keys, monkeypatch):
    key = make_key(keys["own"].with_name("locked"), b"secret")
    words = ("drift-prior", "push", str(built.prior), REPO, "--sign", f"{key}.pem")
    assert_refusal(run(*words), 2, ["is no key that can sign", signing.PASSWORD])
    monkeypatch.setenv(signing.PASSWORD, "wrong")
    assert_refusal(run(*words), 2, ["is no key that can sign"])
    assert REPO not in hub.repos
    monkeypatch.setenv(signing.PASSWORD, "secret")
    assert run(*words).code == 0
    assert run("drift-prior", "pull", REPO, "-o", "here").code == 0
    verify("here", key)


def test_what_is_no_key_is_refused_before_anything_is_sent(hub, built, keys, tmp_path):
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import rsa

    private = rsa.generate_private_key(65537, 2048)
    pem = private.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    (tmp_path / "rsa.pem").write_bytes(pem)
    (tmp_path / "text.pem").write_text("a key")
    for name, code, mention in (
        ("rsa.pem", 2, "is no key that can sign"),
        ("text.pem", 2, "is no key that can sign"),
        ("own.pub", 2, "is no key that can sign"),
        ("absent.pem", 3, "openssl ecparam"),
    ):
        words = ("push", str(built.prior), REPO, "--sign", str(tmp_path / name))
        assert_refusal(run("drift-prior", *words), code, [mention])
    assert not hub.requests()


def test_keyless_signing_asks_sigstore(hub, built, keys, monkeypatch):
    """Its servers are not at hand: that they are asked, and by whom, is all that is seen here."""
    import model_signing.signing

    asked = []
    monkeypatch.setattr(
        model_signing.signing.Config, "use_sigstore_signer", lambda self: asked.append(self)
    )
    signing.signer(signing.KEYLESS)
    assert len(asked) == 1


def test_without_model_signing_the_extra_is_named(hub, built, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    result = run("drift-prior", "push", str(built.prior), REPO, "--sign", "key.pem")
    assert_refusal(result, 2, ["pip install 'drift_merge[sign]'"])
    assert not hub.requests()
