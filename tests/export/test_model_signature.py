import base64
import copy
import json
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from fedclaw.errors import BundleError
from fedclaw.export.check import SMALL
from fedclaw.export.model_signature import (
    PREDICATE_TYPE,
    parse_envelope,
    parse_statement,
    pre_authentication_encoding,
    root_digest,
    sign_digests,
    verify_digests,
)
from fedclaw.export.signature import check_signature
from fedclaw.identity import pki
from fedclaw.identity.federation_home import ReleaseSigner

VECTORS = Path(__file__).parents[3] / "shared" / "data" / "oms-1.0"
"""The specification's own examples, where somebody has put them beside the checkout."""

FILES = {"model.onnx": sha256(b"a").hexdigest(), "bundle.json": sha256(b"b").hexdigest()}


def certificate_for(key):
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "release")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(pki.now())
        .not_valid_after(pki.now().replace(year=2090))
    )
    return builder.sign(key, hashes.SHA256())


def signer_with(key):
    pem = pki.pem_of(certificate_for(key))
    return ReleaseSigner(key, pem, pem)


class Signed:
    """A `model.sig`, who signed it, and what it says in plain values."""

    def __init__(self, key):
        self.key = key
        self.signer = signer_with(key)
        self.release = x509.load_pem_x509_certificate(self.signer.certificate_pem)
        self.content = sign_digests(FILES, "model", self.signer)
        self.plain = json.loads(self.content)
        self.statement = json.loads(base64.b64decode(self.plain["dsseEnvelope"]["payload"]))

    def verify(self, content):
        return verify_digests(content, self.release, self.release)

    def resigned(self, payload):
        """The same around another `payload`, signed anew."""
        plain = copy.deepcopy(self.plain)
        signature = self.signer.sign(pre_authentication_encoding(payload))
        plain["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
        plain["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(signature).decode()
        return json.dumps(plain).encode()


@pytest.fixture(scope="module")
def signed():
    return Signed(pki.new_key())


def edited(plain, change):
    """A copy of `plain` as JSON, after `change` was done to it."""
    plain = copy.deepcopy(plain)
    change(plain)
    return json.dumps(plain).encode()


def test_what_is_signed_and_how(signed):
    """The bytes by hand, from DSSE's and the specification's text."""
    assert signed.verify(signed.content) == FILES
    statement = signed.statement
    assert [resource["name"] for resource in statement["predicate"]["resources"]] == ["bundle.json", "model.onnx"]
    root = sha256(sha256(b"b").digest() + sha256(b"a").digest()).hexdigest()
    assert statement["subject"] == [{"name": "model", "digest": {"sha256": root}}]
    payload = base64.b64decode(signed.plain["dsseEnvelope"]["payload"])
    message = b"DSSEv1 28 application/vnd.in-toto+json " + str(len(payload)).encode() + b" " + payload
    signature = base64.b64decode(signed.plain["dsseEnvelope"]["signatures"][0]["sig"])
    signed.key.public_key().verify(signature, message, ec.ECDSA(hashes.SHA384()))
    (certificate,) = signed.plain["verificationMaterial"]["x509CertificateChain"]["certificates"]
    assert x509.load_der_x509_certificate(base64.b64decode(certificate["rawBytes"])) == signed.release


@pytest.mark.parametrize(
    ("curve", "hashed"),
    [(ec.SECP256R1(), hashes.SHA256()), (ec.SECP384R1(), hashes.SHA384()), (ec.SECP521R1(), hashes.SHA512())],
)
def test_each_curve_goes_with_its_hash(curve, hashed):
    signed = Signed(ec.generate_private_key(curve))
    assert signed.verify(signed.content) == FILES
    envelope = parse_envelope(signed.content)
    message = pre_authentication_encoding(envelope.payload)
    signed.key.public_key().verify(envelope.signature, message, ec.ECDSA(hashed))
    wrong = hashes.SHA512() if curve.key_size != 521 else hashes.SHA256()
    plain = copy.deepcopy(signed.plain)
    plain["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(signed.key.sign(message, ec.ECDSA(wrong))).decode()
    with pytest.raises(BundleError, match=r"model\.sig is not release\.crt's signature"):
        signed.verify(json.dumps(plain).encode())


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (ec.generate_private_key(ec.SECP256K1()), "curve secp256k1 cannot sign; P-256, P-384 and P-521 can"),
        (ec.generate_private_key(ec.BrainpoolP256R1()), "curve brainpoolP256r1 cannot sign"),
        (rsa.generate_private_key(65537, 2048), "does not hold an ECDSA key"),
    ],
)
def test_other_keys_are_refused(signed, key, words):
    release = certificate_for(key)
    content = edited(
        signed.plain,
        lambda plain: plain["verificationMaterial"]["x509CertificateChain"].update(
            certificates=[{"rawBytes": base64.b64encode(release.public_bytes(pki.Encoding.DER)).decode()}]
        ),
    )
    with pytest.raises(BundleError, match=words):
        verify_digests(content, release, release)


def test_every_changed_byte_of_the_file_is_refused(signed):
    content = bytearray(signed.content)
    for position in range(len(content)):
        content[position] ^= 1
        with pytest.raises(BundleError, match=r"model\.sig"):
            signed.verify(bytes(content))
        content[position] ^= 1


def chain(plain):
    return plain["verificationMaterial"]["x509CertificateChain"]["certificates"]


def envelope(plain):
    return plain["dsseEnvelope"]


def signature(plain):
    return plain["dsseEnvelope"]["signatures"][0]


def twin(text):
    """Another spelling of the same base64, with bits set that nobody reads."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    body = text.rstrip("=")
    changed = body[:-1] + alphabet[alphabet.index(body[-1]) + 1] + "=" * (len(text) - len(body))
    assert base64.b64decode(changed) == base64.b64decode(text)
    return changed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.update(mediaType="application/vnd.dev.sigstore.bundle+json;version=0.3"), "mediaType"),
        (lambda p: p.pop("mediaType"), "mediaType"),
        (lambda p: p.update(messageSignature={}), "messageSignature"),
        (lambda p: p.update(media_type=p.pop("mediaType")), "mediaType"),
        (lambda p: p.pop("dsseEnvelope"), "dsseEnvelope"),
        (lambda p: p.pop("verificationMaterial"), "verificationMaterial"),
        (lambda p: p.update(verificationMaterial={"tlogEntries": []}), "0 of publicKey"),
        (lambda p: p["verificationMaterial"].update(publicKey={"hint": "a"}), "2 of publicKey"),
        (lambda p: p["verificationMaterial"].update(note="hello"), "note"),
        (lambda p: p["verificationMaterial"].update(tlogEntries=[{}]), "transparency log or timestamps"),
        (lambda p: p["verificationMaterial"].update(timestampVerificationData={}), "transparency log or timestamps"),
        (lambda p: chain(p).clear(), "certificates"),
        (lambda p: chain(p)[0].update(note=1), "note"),
        (lambda p: chain(p)[0].update(rawBytes=base64.b64encode(b"x").decode()), "another certificate than release"),
        (lambda p: chain(p).append({"rawBytes": base64.b64encode(b"x").decode()}), "other certificates than"),
        (lambda p: chain(p).extend([chain(p)[0]] * 2), "other certificates than"),
        (lambda p: envelope(p).update(payloadType="application/json"), "payloadType"),
        (lambda p: envelope(p).update(payload=""), "base64"),
        (lambda p: envelope(p).update(payload=7), "base64"),
        (lambda p: envelope(p).update(payload=envelope(p)["payload"] + "\n"), "base64"),
        (lambda p: envelope(p).update(note=1), "note"),
        (lambda p: envelope(p)["signatures"].append(signature(p)), "signatures"),
        (lambda p: envelope(p)["signatures"].clear(), "signatures"),
        (lambda p: envelope(p).update(signatures=signature(p)), "signatures"),
        (lambda p: signature(p).update(keyid="release"), "keyid"),
        (lambda p: signature(p).update(note=1), "note"),
        (lambda p: signature(p).update(sig=signature(p)["sig"].rstrip("=") + "=" * 4), "base64"),
        (lambda p: signature(p).update(sig="_" + signature(p)["sig"][1:]), "base64"),
        (lambda p: signature(p).update(sig=" " + signature(p)["sig"]), "base64"),
        (lambda p: chain(p)[0].update(rawBytes=twin(base64.b64encode(b"abcd").decode())), "base64"),
    ],
)
def test_an_envelope_that_is_not_of_the_form(signed, change, words):
    with pytest.raises(BundleError, match=r"^model\.sig .*" + words):
        signed.verify(edited(signed.plain, change))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: signature(p).update(keyid=""),
        lambda p: signature(p).update(keyid=None),
        lambda p: p["verificationMaterial"].pop("tlogEntries"),
        lambda p: chain(p).append(chain(p)[0]),  # The CA, which signs itself here.
    ],
)
def test_what_other_signers_write_and_what_says_nothing(signed, change):
    assert signed.verify(edited(signed.plain, change)) == FILES


def resource(statement, place=0):
    return statement["predicate"]["resources"][place]


def serialization(statement):
    return statement["predicate"]["serialization"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"), "_type"),
        (lambda s: s.pop("_type"), "_type"),
        (lambda s: s.update(predicateType="https://model_signing/Digests/v0.1"), "predicateType"),
        (lambda s: s.update(note=1), "note"),
        (lambda s: s["subject"].append(s["subject"][0]), "subject"),
        (lambda s: s["subject"].clear(), "subject"),
        (lambda s: s["subject"][0].update(name=""), "name"),
        (lambda s: s["subject"][0].update(digest={}), "sha256"),
        (lambda s: s["subject"][0]["digest"].update(sha256="0" * 64), "subject's digest is not that of"),
        (lambda s: s["subject"][0]["digest"].update(sha512="0" * 128), "sha512"),
        (lambda s: s["predicate"].update(note=1), "note"),
        (lambda s: s["predicate"].update(resources=[]), "resources"),
        (lambda s: s["predicate"]["resources"].reverse(), "alphabetical order"),
        (lambda s: s["predicate"]["resources"].append(resource(s, 1)), "alphabetical order, each once"),
        (lambda s: resource(s).update(digest=resource(s)["digest"].upper()), "digest"),
        (lambda s: resource(s).update(digest=resource(s)["digest"] + "\n"), "digest"),
        (lambda s: resource(s).update(digest="1" * 128, algorithm="blake2b"), "algorithm"),
        (lambda s: resource(s).update(digest="2" * 64), "subject's digest is not that of"),
        (lambda s: serialization(s).update(method="shards", shard_size=1000), "method"),
        (lambda s: serialization(s).update(shard_size=1000), "shard_size"),
        (lambda s: serialization(s).update(hash_type="blake3"), "hash_type"),
        (lambda s: serialization(s).update(allow_symlinks=True), "symbolic links"),
        (lambda s: serialization(s).update(allow_symlinks="false"), "allow_symlinks"),
        (lambda s: serialization(s).update(ignore_paths=[""]), "ignore_paths"),
        (lambda s: serialization(s).update(ignore_paths="model.sig"), "ignore_paths"),
    ],
)
def test_a_signed_statement_that_is_not_of_the_form(signed, change, words):
    payload = edited(signed.statement, change)
    with pytest.raises(BundleError, match=r"^model\.sig is damaged: .*" + words):
        signed.verify(signed.resigned(payload))


@pytest.mark.parametrize(
    "name",
    [
        "../a",
        "/a",
        "..",
        ".a",
        "a/b",
        "a\\b",
        "a\0",
        "a\n",
        "",
        "a" * 101,
        "\N{CYRILLIC SMALL LETTER A}",
        "a:0:9",
        7,
        None,
    ],
)
def test_a_signed_statement_that_names_what_is_no_file_of_a_bundle(signed, name):
    payload = edited(signed.statement, lambda statement: resource(statement).update(name=name))
    with pytest.raises(BundleError, match=r"^model\.sig is damaged: predicate\.resources\.0\.name") as caught:
        signed.verify(signed.resigned(payload))
    assert str(caught.value).isprintable()


def test_more_in_a_resource_is_ignored_as_the_specification_asks(signed):
    def change(statement):
        resource(statement).update(annotations={"by": "somebody"}, mediaType="text/plain")
        statement["subject"][0]["uri"] = "urn:x"
        serialization(statement)["ignore_paths"] = [".git", "model.sig"]

    assert signed.verify(signed.resigned(edited(signed.statement, change))) == FILES


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"[]", "should be a valid dictionary"),
        (b"\xff\xfe{\x00}\x00", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"mediaType": 1, "mediaType": 2}', "a name stands twice"),
        (b'{"mediaType": NaN}', "NaN is no number"),
        (b"[" * (SMALL // 2), "nested too deeply"),
        (b'{"a":' * (SMALL // 8), "nested too deeply"),
        (b'{"mediaType": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"\\u001b[2J\\nx": 1}', r"\?\[2J\?x"),
    ],
)
def test_what_is_no_json_of_this_kind(signed, content, words):
    with pytest.raises(BundleError, match=r"^model\.sig is damaged: .*" + words) as caught:
        signed.verify(content)
    assert str(caught.value).isprintable()
    with pytest.raises(BundleError, match=r"^model\.sig is damaged: .*"):
        signed.verify(signed.resigned(content or b" "))


def test_a_name_that_stands_twice_in_what_is_signed_is_refused(signed):
    """Each reader would take another one of the two."""
    payload = json.dumps(signed.statement).encode().replace(b'"name"', b'"name": "other.onnx", "name"')
    with pytest.raises(BundleError, match="a name stands twice in one object"):
        signed.verify(signed.resigned(payload))


def test_a_signature_for_something_else_is_none(signed):
    payload = parse_envelope(signed.content).payload
    others = [payload, b"DSSEv1 " + payload, b"DSSEV1" + pre_authentication_encoding(payload)[6:]]
    for message in [*others, pki.signed_content("plan", payload)]:
        plain = copy.deepcopy(signed.plain)
        signature(plain)["sig"] = base64.b64encode(signed.signer.sign(message)).decode()
        with pytest.raises(BundleError, match=r"model\.sig is not release\.crt's signature"):
            signed.verify(json.dumps(plain).encode())


def test_a_signature_has_one_spelling_in_der(signed):
    r, s = decode_dss_signature(parse_envelope(signed.content).signature)
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
    good = encode_dss_signature(r, s)
    padded = b"\x30" + bytes([good[1] + 1, 2, good[3] + 1, 0]) + good[4:]
    spellings = [good + b"\0", good[:-1], b"\x30\x81" + good[1:], padded]
    values = [(r + order, s), (r, s + order), (0, s), (r, 0), (s, r), (order - r, s)]
    for signature_ in spellings + [encode_dss_signature(*pair) for pair in values]:
        with pytest.raises(BundleError, match=r"model\.sig is not release\.crt's signature"):
            signed.verify(with_signature(signed, signature_))
    # ECDSA's own twin, which needs no key: the reason why the bytes of model.sig name nothing.
    assert signed.verify(with_signature(signed, encode_dss_signature(r, order - s))) == FILES


def with_signature(signed, content):
    return edited(signed.plain, lambda plain: signature(plain).update(sig=base64.b64encode(content).decode()))


@pytest.mark.parametrize(
    ("material", "words"),
    [
        (
            {"publicKey": {"hint": "e845"}},
            "signed by a bare key, not a certificate: a bundle of a federation is signed by its release certificate",
        ),
        ({"publicKey": {"rawBytes": "AAAA", "keyDetails": "PKIX_ECDSA_P384_SHA_384"}}, "signed by a bare key"),
        ({"certificate": {"rawBytes": "AAAA"}, "tlogEntries": [{"logIndex": "1"}]}, "signed by Sigstore"),
        ({"certificate": {"rawBytes": "AAAA"}, "tlogEntries": []}, "comes with an entry of a transparency log"),
        ({"certificate": {"rawBytes": "AAAA"}}, "comes with an entry of a transparency log"),
        ({"publicKey": {}}, "names no key"),
    ],
)
def test_the_other_methods_of_signing_are_refused_by_name(signed, material, words):
    with pytest.raises(BundleError, match=words):
        signed.verify(edited(signed.plain, lambda plain: plain.update(verificationMaterial=material)))


def vectors(folder):
    found = sorted((VECTORS / "test-vectors" / "v1.0" / folder).glob("*.bundle.json"))
    return found or [pytest.param(None, marks=pytest.mark.skip(f"{VECTORS} is not there"))]


@pytest.mark.parametrize("path", vectors("valid"), ids=lambda path: path and path.name)
def test_the_specifications_own_examples_are_read(path, signed):
    content = path.read_bytes()
    envelope_ = parse_envelope(content)
    assert path.name == f"{envelope_.method}.bundle.json"
    assert list(parse_statement(envelope_.payload)) == ["signme-1", "signme-2"]
    says = {"certificate": "another certificate", "key": "signed by a bare key", "sigstore": "signed by Sigstore"}
    with pytest.raises(BundleError, match=says[envelope_.method]):
        signed.verify(content)


@pytest.mark.parametrize("path", [path for path in vectors("valid") if "cert" in str(path)] or vectors("nowhere"))
def test_the_signature_of_the_specifications_certificate_holds(path):
    envelope_ = parse_envelope(path.read_bytes())
    leaf, issuer = map(x509.load_der_x509_certificate, envelope_.certificates)
    leaf.verify_directly_issued_by(issuer)
    message = pre_authentication_encoding(envelope_.payload)
    check_signature(leaf, envelope_.signature, message, "refused")
    with pytest.raises(BundleError, match="refused"):
        check_signature(leaf, envelope_.signature, message + b" ", "refused")
    assert set(verify_digests(path.read_bytes(), leaf, issuer)) == {"signme-1", "signme-2"}


@pytest.mark.parametrize("path", vectors("invalid"), ids=lambda path: path and path.name)
def test_the_specifications_bad_examples_are_refused(path):
    with pytest.raises(BundleError, match=r"^model\.sig is damaged: "):
        parse_envelope(path.read_bytes())


@pytest.mark.parametrize("path", vectors("invalid-payload"), ids=lambda path: path and path.name)
def test_the_specifications_bad_statements_are_refused(path):
    with pytest.raises(BundleError, match=r"^model\.sig is damaged: predicateType"):
        parse_statement(parse_envelope(path.read_bytes()).payload)


@pytest.mark.skipif(not VECTORS.exists(), reason=f"{VECTORS} is not there")
def test_what_is_written_fits_the_specifications_schemas(signed):
    from jsonschema import Draft202012Validator
    from referencing import Registry, Resource

    schemas = {path.name: json.loads(path.read_bytes()) for path in (VECTORS / "schemas" / "v1.0").iterdir()}
    registry = Registry().with_resources((s["$id"], Resource.from_contents(s)) for s in schemas.values())
    for name, plain in (("bundle", signed.plain), ("statement", signed.statement)):
        Draft202012Validator(schemas[f"{name}.schema.json"], registry=registry).validate(plain)
    with pytest.raises(Exception, match=PREDICATE_TYPE):
        Draft202012Validator(schemas["statement.schema.json"], registry=registry).validate(
            {**signed.statement, "predicateType": "other"}
        )


ODD = st.sampled_from([None, True, False, 0, -1, 1.5, 10**400, "", "a", "\ud800", "\0", [], {}, [[]], {"": None}])


def places(plain, path=()):
    """Every place in nested plain values."""
    yield path
    below = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ()
    for step, value in below:
        yield from places(value, (*path, step))


def mutated(data, plain):
    """`plain` with some places replaced, removed, doubled or given a new name."""
    plain = copy.deepcopy(plain)
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(list(places(plain))[1:] or [("", "")]))
        holder = plain
        for step in path:
            holder = holder[step]
        if not isinstance(holder, dict | list):
            continue
        how = data.draw(st.integers(0, 3))
        if how == 0:
            holder[last] = data.draw(ODD)
        elif how == 1:
            del holder[last]
        elif isinstance(holder, list):
            holder.append(data.draw(ODD))
        else:
            holder[data.draw(st.text(max_size=4))] = holder[last] if how == 2 else data.draw(ODD)
    return plain


def outcome(signed, content):
    """The digests, or None and why there are none."""
    try:
        return signed.verify(content), ""
    except BundleError as error:
        return None, str(error)


@given(data=st.data())
def test_whatever_is_done_to_it_the_error_is_one_line(data, signed):
    """Of the envelope, and of a statement that is signed all the same."""
    statement = json.dumps(mutated(data, signed.statement)).encode()
    for content in (json.dumps(mutated(data, signed.plain)).encode(), signed.resigned(statement)):
        found, refusal = outcome(signed, content)
        assert refusal.isprintable()
        assert found is None or root_digest(found) == root_digest(FILES)


@given(content=st.binary(max_size=200), place=st.integers(0, 10_000))
def test_bytes_put_into_it_are_refused_or_mean_nothing(content, place, signed):
    place %= len(signed.content)
    for changed in (signed.content[:place] + content + signed.content[place:], content, signed.content[:place]):
        found, refusal = outcome(signed, changed)
        assert refusal.isprintable()
        assert found in (None, FILES)
