"""The cluster's certificates and kubeconfigs, made anew at every start.

Two authorities: what the cluster's own signs may speak to the API server, and only what etcd's signs may speak to etcd.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from infra.cluster.layout import API_ADDRESS, API_PORT, NODE, NODE_ADDRESS, SERVICE_NETWORK, Layout

VALID = datetime.timedelta(days=365)
CLOCK_SKEW = datetime.timedelta(minutes=5)
SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


@dataclass(frozen=True, slots=True)
class Identity:
    """A name with its key; signed by itself it is an authority."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def write(self, folder: Path, name: str) -> None:
        """Write NAME.key (0600) and NAME.crt."""
        write_private(folder / f"{name}.key", _private_pem(self.key))
        (folder / f"{name}.crt").write_bytes(self.pem)

    @property
    def pem(self) -> bytes:
        """The certificate as text."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def authority(name: str) -> Identity:
    """A new certificate authority of that name."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _builder(subject, subject, key).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    builder = builder.add_extension(_usage(sign=True), critical=True)
    return Identity(key, builder.sign(key, hashes.SHA256()))


def issue(issuer: Identity, name: str, group: str = "", hosts: tuple[str, ...] = ()) -> Identity:
    """A client's certificate for user `name` of `group`; with `hosts`, names or addresses, a server's as well."""
    key = ec.generate_private_key(ec.SECP256R1())
    parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group)] if group else []
    subject = x509.Name([*parts, x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _builder(subject, issuer.certificate.subject, key)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(sign=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([CLIENT, SERVER] if hosts else [CLIENT]), critical=False)
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    return Identity(key, builder.sign(issuer.key, hashes.SHA256()))


def write_all(layout: Layout) -> None:
    """Make every key, certificate and kubeconfig of a new cluster."""
    layout.pki.mkdir(mode=0o700, parents=True, exist_ok=True)
    ca, etcd = authority("pigeon-cluster"), authority("pigeon-cluster-etcd")
    ca.write(layout.pki, "ca")
    etcd.write(layout.pki, "etcd-ca")
    issue(etcd, "etcd", hosts=(API_ADDRESS,)).write(layout.pki, "etcd")
    issue(etcd, "kube-apiserver").write(layout.pki, "apiserver-etcd")
    names = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost")
    addresses = (API_ADDRESS, NODE_ADDRESS, str(SERVICE_NETWORK[1]))
    issue(ca, "kube-apiserver", hosts=(*names, *addresses)).write(layout.pki, "apiserver")
    issue(ca, "kube-apiserver-kubelet-client", "system:masters").write(layout.pki, "apiserver-kubelet")
    issue(ca, f"system:node:{NODE}", "system:nodes", hosts=(NODE, NODE_ADDRESS)).write(layout.pki, "kubelet")
    _write_service_account_keys(layout.pki)
    clients = {
        layout.pki / "controller-manager.kubeconfig": issue(ca, "system:kube-controller-manager"),
        layout.pki / "scheduler.kubeconfig": issue(ca, "system:kube-scheduler"),
        layout.pki / "kubelet.kubeconfig": issue(ca, f"system:node:{NODE}", "system:nodes"),
        layout.kubeconfig: issue(ca, "pigeon-admin", "system:masters"),
    }
    for path, client in clients.items():
        write_private(path, json.dumps(kubeconfig(ca, client), indent=1).encode())


def kubeconfig(ca: Identity, client: Identity) -> dict[str, object]:
    """A kubeconfig that needs no other file."""
    cluster = {"server": f"https://{API_ADDRESS}:{API_PORT}", "certificate-authority-data": _base64(ca.pem)}
    user = {"client-certificate-data": _base64(client.pem), "client-key-data": _base64(_private_pem(client.key))}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "pigeon", "cluster": cluster}],
        "users": [{"name": "pigeon", "user": user}],
        "contexts": [{"name": "pigeon", "context": {"cluster": "pigeon", "user": "pigeon"}}],
        "current-context": "pigeon",
    }


def write_private(path: Path, data: bytes) -> None:
    """Write a file that nobody else could read at any moment."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(data)


def _write_service_account_keys(folder: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    write_private(folder / "service-account.key", _private_pem(key))
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "service-account.pub").write_bytes(public)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + VALID)
    )


def _usage(*, sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign,
        crl_sign=sign,
        encipher_only=False,
        decipher_only=False,
    )


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _private_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
