"""The Helm chart and the manifest made from it: rendered and installed by Helm's own library, applied by kubectl, held
to Kubernetes' published schemas and to what an installation must not allow."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import re
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from install_kit import CHART, INSTALL, NAMESPACE, VALUES, helm, manifests, objects, of_kind, pod_specs
from kube_kit import Kubectl

from greenroom.cli import cluster
from greenroom.cli.main import cli
from greenroom.cli.tcp import POD_IP_VARIABLE
from greenroom.core.ledger.records import Slot, SlotState
from greenroom.operator import installation, specs, worker_pod
from greenroom.operator.objects import Meta
from greenroom.testing.fake_kube.http import FakeKube

#: Releases of Kubernetes whose schemas every object is held to: the oldest that the chart takes, and a recent one.
RELEASES = ("1.28", "1.37")
#: Kinds that are not Kubernetes' own.
FOREIGN = {"Certificate"}


@pytest.fixture
async def kube() -> AsyncIterator[FakeKube]:
    async with FakeKube() as server:
        namespaces = server.api.objects.registry.get("", "v1", "namespaces")
        assert namespaces is not None
        server.api.objects.create(namespaces, "", {"metadata": {"name": NAMESPACE}})
        yield server


def found_in(kube: FakeKube, group: str, plural: str) -> dict[str, Any]:
    state = kube.api.objects.state.get((group, plural), {})
    here = {name: obj for (namespace, name), obj in state.items() if namespace in ("", NAMESPACE)}
    # Without what Helm remembers of releases.
    return {name: obj for name, obj in here.items() if not name.startswith("sh.helm.")}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_every_object_is_as_kubernetes_schemas_say(values: dict[str, Any], release: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for obj in objects(values):
        if obj["kind"] not in FOREIGN:
            validate.validate(obj, release, strict=True)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_helm_finds_nothing_to_complain_about(values: dict[str, Any]) -> None:
    told = helm().lint(CHART, values, strict=True)
    assert [m for m in told["messages"] if "icon" not in m["error"]] == [] and not told["errors"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "there is no store"),
        ({"store": {"bundled": {"enabled": True}}}, "snapshots.url is missing"),
        ({"store": {"existingSecret": "a", "bundled": {"enabled": True}}}, "contradict each other"),
        ({"store": {"existingSecret": "a"}, "tls": {"certManager": {"enabled": True}}}, "issuerRef is missing"),
        ({"store": {"existingSecret": "a"}, "snapshots": {"url": "/tmp/x"}}, "/snapshots/url"),
        ({"store": {"existingSecret": "a"}, "replicas": 3}, "additional properties 'replicas' not allowed"),
        ({"store": {"existingSecret": "a"}, "controlPlane": {"replicas": 0}}, "/controlPlane/replicas"),
        ({"store": {"existingSecret": "a"}, "image": {"digest": "sha256:1"}}, "/image/digest"),
    ],
)
def test_values_that_make_no_installation_are_refused_by_name(values: dict[str, Any], says: str) -> None:
    with pytest.raises(helm().HelmError) as refused:
        objects(values)
    assert says in str(refused.value)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_no_pod_has_a_privilege(values: dict[str, Any]) -> None:
    for name, spec in pod_specs(objects(values)).items():
        whole = spec["securityContext"]
        assert whole["runAsNonRoot"] and whole["runAsUser"] > 0, name
        assert whole["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not any(spec.get(field) for field in ("hostNetwork", "hostPID", "hostIPC")), name
        assert not any("hostPath" in volume for volume in spec.get("volumes", ())), name
        for container in spec["containers"]:
            own = container["securityContext"]
            assert own["readOnlyRootFilesystem"] and not own["allowPrivilegeEscalation"], name
            assert own["capabilities"] == {"drop": ["ALL"]}, name
            assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"], name
            # No password or token is an argument or a value: they show in `kubectl describe`.
            assert not any("postgresql://" in str(text) for text in container.get("args", ())), name
        # Only the operator has anything to do with the API server.
        accounts = of_kind(objects(values), "ServiceAccount")
        account = spec.get("serviceAccountName", "")
        token = spec.get("automountServiceAccountToken", accounts.get(account, {}).get("automountServiceAccountToken"))
        assert bool(token) is (name == "greenroom-operator"), name


def test_the_operator_sees_no_key_and_no_token_of_agents() -> None:
    volumes = {v["name"]: v for v in pod_specs(objects(VALUES["trial"]))["greenroom-operator"]["volumes"]}
    assert [i["key"] for i in volumes["tls"]["secret"]["items"]] == ["ca.crt"]
    assert [i["key"] for i in volumes["tokens"]["secret"]["items"]] == ["api"]


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_every_pod_has_a_policy_and_every_policy_both_directions(values: dict[str, Any]) -> None:
    found = objects(values)
    policies = of_kind(found, "NetworkPolicy")
    assert policies["greenroom-default-deny"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    selected = {
        p["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        for name, p in policies.items()
        if name != "greenroom-default-deny"
    }
    pods = {
        o["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
        for o in of_kind(found, "Deployment", "StatefulSet").values()
    }
    assert selected == pods | {"worker"}
    assert all(p["spec"]["policyTypes"] == ["Ingress", "Egress"] for p in policies.values())


def test_a_worker_reaches_the_control_plane_names_and_what_is_outside_alone() -> None:
    worker = of_kind(objects(VALUES["trial"]), "NetworkPolicy")["greenroom-worker"]["spec"]
    (inward,) = worker["ingress"]
    assert inward["ports"] == [{"protocol": "TCP", "port": 7435}] and _component(inward["from"]) == "control-plane"
    names, control, outside = worker["egress"]
    assert {p["port"] for p in names["ports"]} == {53}
    assert control["ports"] == [{"protocol": "TCP", "port": 7434}] and _component(control["to"]) == "control-plane"
    assert {p["port"] for p in outside["ports"]} == {443}
    # A cloud's metadata, which hands out credentials, and whatever else is inside.
    assert {"169.254.0.0/16", "10.0.0.0/8"} <= set(outside["to"][0]["ipBlock"]["except"])


def _opened(lists: dict[str, Any]) -> dict[str, Any]:
    values = {**VALUES["manifest"], "networkPolicies": lists}
    return {name: p["spec"] for name, p in of_kind(objects(values), "NetworkPolicy").items()}


def test_of_each_list_of_peers_nothing_is_nobody_and_anything_is_everybody() -> None:
    lists = ("gatewayFrom", "apiFrom", "metricsFrom", "dnsTo", "storeTo")
    open_to_all, closed = (_opened({name: peers for name in lists}) for peers in ([{}], []))
    for policies in (open_to_all, closed):
        for name, spec in policies.items():
            for rule in (*spec.get("ingress", ()), *spec.get("egress", ())):
                assert {} not in (*rule.get("from", ()), *rule.get("to", ())), f"{name}: the API server refuses that"
                assert rule.get("from") != [] and rule.get("to") != [], f"{name}: to Kubernetes that is everybody"
                assert rule["ports"], f"{name}: and that is every port"

    def to_all(spec: dict[str, Any]) -> set[Any]:
        rules = (*spec.get("ingress", ()), *spec.get("egress", ()))
        return {port["port"] for rule in rules if "from" not in rule and "to" not in rule for port in rule["ports"]}

    assert to_all(open_to_all["greenroom"]) == {"api", "gateway", "metrics", 53, 5432}
    assert to_all(closed["greenroom"]) == set()
    assert to_all(open_to_all["greenroom-operator"]) == {"metrics", 53, 443, 6443}
    assert "ingress" not in closed["greenroom-operator"] and to_all(closed["greenroom-operator"]) == {443, 6443}


def test_without_ports_nothing_outside_is_reached() -> None:
    policies = _opened({"outside": {"ports": []}})
    cidrs = [peer for spec in policies.values() for rule in spec.get("egress", ()) for peer in rule.get("to", ())]
    assert cidrs and not any("ipBlock" in peer for peer in cidrs)


def test_a_replica_tells_agents_its_own_pods_address() -> None:
    """It listens on every address; of the name of its pod a cluster's DNS need not know anything."""
    env = pod_specs(objects(VALUES["trial"]))["greenroom"]["containers"][0]["env"]
    assert {"name": POD_IP_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}} in env


def _component(peers: list[dict[str, Any]]) -> str:
    (peer,) = peers
    return str(peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"])


def test_services_and_budgets_select_the_pods_that_they_are_for() -> None:
    found = objects(VALUES["everything"])
    templates = {
        name: (o["spec"]["template"]["metadata"]["labels"], o["spec"]["template"]["spec"]["containers"][0]["ports"])
        for name, o in of_kind(found, "Deployment").items()
    }
    for kind in ("Service", "PodDisruptionBudget"):
        for name, obj in of_kind(found, kind).items():
            selector = obj["spec"]["selector"]
            labels, ports = templates[name]
            assert (selector.get("matchLabels") or selector).items() <= labels.items(), (kind, name)
            for port in obj["spec"].get("ports", ()):
                assert port["targetPort"] in {p["name"] for p in ports}, (name, port)
    service = of_kind(found, "Service")["greenroom"]
    assert {p["name"]: p["port"] for p in service["spec"]["ports"]} == {
        "api": 7433,
        "agents": 7434,
        "gateway": 8080,
        "metrics": 9464,
    }


def test_what_is_shipped_is_what_the_chart_gives_and_has_no_secret_in_it() -> None:
    text = INSTALL.read_text()
    assert text == manifests().render(), "run make manifests"
    assert manifests().render() == manifests().render(), "the same each time"
    kinds = {o["kind"] for o in yaml.safe_load_all(text)}
    assert "Secret" not in kinds and "CustomResourceDefinition" in kinds


async def test_kubectl_applies_it_and_again_changes_nothing(kube: FakeKube, tmp_path: Path) -> None:
    kubectl = Kubectl(tmp_path, kube.kubeconfig(tmp_path / "config"))
    apply = ("apply", "--server-side", "-f", str(INSTALL))
    await kubectl(*apply)
    assert set(found_in(kube, "apps", "deployments")) == {"greenroom", "greenroom-operator"}
    assert len(found_in(kube, "apiextensions.k8s.io", "customresourcedefinitions")) == 3
    before = kube.api.objects.rv
    await kubectl(*apply)
    assert kube.api.objects.rv == before


async def test_helm_installs_and_an_upgrade_keeps_keys_tokens_and_passwords(kube: FakeKube, tmp_path: Path) -> None:
    config = kube.kubeconfig(tmp_path / "config", namespace=NAMESPACE)
    with release(config) as client:
        await asyncio.to_thread(client.install, CHART, "greenroom", VALUES["trial"])
        first = {name: obj["data"] for name, obj in found_in(kube, "", "secrets").items()}
        assert set(first) == {"greenroom-tls", "greenroom-tokens", "greenroom-postgresql"}
        more = {**VALUES["trial"], "controlPlane": {"replicas": 3}}
        await asyncio.to_thread(client.upgrade, CHART, "greenroom", more)
        assert {name: obj["data"] for name, obj in found_in(kube, "", "secrets").items()} == first
        assert found_in(kube, "apps", "deployments")["greenroom"]["spec"]["replicas"] == 3
        assert "greenroom" in found_in(kube, "policy", "poddisruptionbudgets")

        await asyncio.to_thread(client.uninstall, "greenroom")
        assert not found_in(kube, "apps", "deployments")
        # What people made, and what can't be made again, stays.
        assert len(found_in(kube, "apiextensions.k8s.io", "customresourcedefinitions")) == 3
        assert set(found_in(kube, "", "secrets")) == set(first)


async def test_what_helm_makes_lets_a_client_trust_the_server(kube: FakeKube, tmp_path: Path) -> None:
    config = kube.kubeconfig(tmp_path / "config", namespace=NAMESPACE)
    with release(config) as client:
        await asyncio.to_thread(client.install, CHART, "greenroom", VALUES["trial"])
    secrets = {
        name: {key: base64.b64decode(value).decode() for key, value in obj["data"].items()}
        for name, obj in found_in(kube, "", "secrets").items()
    }
    assert len(set(secrets["greenroom-tokens"].values())) == 2, "agents and clients have different ones"
    assert all(len(token) >= 32 for token in secrets["greenroom-tokens"].values())
    tls = secrets["greenroom-tls"]
    for name, text in tls.items():
        (tmp_path / name).write_text(text)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    trusting = ssl.create_default_context(cadata=tls["ca.crt"])
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=serving)
    async with server:
        port = server.sockets[0].getsockname()[1]
        for name in ("greenroom", f"greenroom.{NAMESPACE}.svc", "localhost", "127.0.0.1"):
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting, server_hostname=name)
            seen = writer.get_extra_info("peercert")
            ends = datetime.datetime.strptime(seen["notAfter"], "%b %d %H:%M:%S %Y %Z")
            assert ends - datetime.datetime.now() > datetime.timedelta(days=3000)
            writer.close()
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.open_connection("127.0.0.1", port, ssl=trusting, server_hostname="other")


@contextlib.contextmanager
def release(config: Path) -> Iterator[Any]:
    """Helm at that cluster."""
    with helm().Config(kubeconfig_path=str(config), namespace=NAMESPACE) as client:
        yield client


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_the_commands_of_pods_take_their_options(values: dict[str, Any]) -> None:
    for name, spec in pod_specs(objects(values)).items():
        for container in spec["containers"]:
            if "args" not in container:
                continue
            given = {e["name"]: e.get("value", "from a secret") for e in container["env"]}
            given["SNAPSHOTS_URL"] = "s3://bucket/prefix"
            command, *args = (_expanded(arg, given) for arg in container["args"])
            found = cli.get_command(click.Context(cli), command)
            assert found is not None, (name, command)
            parsed = found.make_context(command, list(args)).params
            assert parsed["snapshots"] == "s3://bucket/prefix"
            # What it is asked for and where, as the Service and probes have it.
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            for option, port in (("agents", "agents"), ("metrics", "metrics"), ("health", "health")):
                if option in parsed:
                    assert parsed[option] == ("0.0.0.0", ports[port])


def _expanded(text: str, environment: dict[str, str]) -> str:
    """As a kubelet does it with ``$(NAME)``."""
    return re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], text)


def test_names_that_others_rely_on_are_the_charts() -> None:
    """The command line and the operator look for the installation by these."""
    found = objects(VALUES["trial"])
    secrets = of_kind(found, "Secret")
    assert secrets[cluster.TLS_SECRET]["data"].keys() == {"tls.crt", "tls.key", cluster.AUTHORITY_KEY}
    assert secrets[cluster.TOKENS_SECRET]["data"].keys() == {"agents", cluster.TOKEN_KEY}
    assert (installation.TLS_SECRET, installation.TOKEN_SECRET) == (cluster.TLS_SECRET, cluster.TOKENS_SECRET)
    service = of_kind(found, "Service")[cluster.SERVICE]
    assert cluster.PORT_NAME in {port["name"] for port in service["spec"]["ports"]}
    assert specs.WorkerPodSpec().service_account in of_kind(found, "ServiceAccount")
    # Policies select workers by the labels that the operator gives them.
    worker = of_kind(found, "NetworkPolicy")["greenroom-worker"]["spec"]["podSelector"]["matchLabels"]
    made = worker_pod.labels(Meta(name="p", uid="u"), Slot(epoch=1, ordinal=0, term=1, state=SlotState.RESERVED))
    assert worker.items() <= made.items()
    assert of_kind(found, "NetworkPolicy")["greenroom-worker"]["spec"]["ingress"][0]["ports"][0]["port"] == (
        worker_pod.ACTORS_PORT
    )
