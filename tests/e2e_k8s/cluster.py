"""A Kubernetes of one node in a network namespace of its own: real API server, controllers, scheduler, kubelet, proxy.

Nothing of it is on the machine's network: the namespace has one cable to the host, 10.77.0.0/24, over which the tests
reach the API server and the node pulls images. Pods are 10.78.0.0/24, services 10.96.0.0/16.
"""

import json
import signal
import ssl
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from manifests import tools
from tests.e2e_containers.daemons import answers, daemon, remove_cgroups, run, tail, unchanged, wait
from tests.e2e_k8s.build import KUBERNETES

NAMESPACE, CABLE = "k2e2e", "k2e2e0"
NODE, HOST = "10.77.0.1", "10.77.0.254"
SERVER = f"https://{NODE}:6443"
REGISTRY = f"{HOST}:5055"
TOKEN = "e2e-admin"
SYSCTLS = ("vm.overcommit_memory", "kernel.panic", "kernel.panic_on_oops", "net.ipv4.ip_forward")
INSIDE = ("nsenter", f"--net=/run/netns/{NAMESPACE}")

CONTROL_PLANE = {
    "etcd": """
        etcd --data-dir {folder}/etcd --unsafe-no-fsync
        --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379
        --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380
        --initial-cluster default=http://127.0.0.1:2380""",
    "kube-apiserver": """
        {binaries}/kube-apiserver --etcd-servers=http://127.0.0.1:2379
        --bind-address={node} --advertise-address={node} --secure-port=6443 --cert-dir={folder}/pki
        --service-cluster-ip-range=10.96.0.0/16 --service-account-issuer=https://kubernetes.default.svc
        --service-account-key-file={folder}/pki/sa.pub --service-account-signing-key-file={folder}/pki/sa.key
        --token-auth-file={folder}/tokens.csv --authorization-mode=Node,RBAC
        --enable-admission-plugins=NodeRestriction --kubelet-preferred-address-types=InternalIP
        --feature-gates=TTLAfterFinished=true""",
    "kube-controller-manager": """
        {binaries}/kube-controller-manager --kubeconfig={folder}/kcm.kubeconfig --bind-address=127.0.0.1
        --leader-elect=false --controllers=*,-csrsigning,-nodeipam --root-ca-file={folder}/pki/apiserver.crt
        --service-account-private-key-file={folder}/pki/sa.key --feature-gates=TTLAfterFinished=true""",
    "kube-scheduler": """
        {binaries}/kube-scheduler --kubeconfig={folder}/kcm.kubeconfig --bind-address=127.0.0.1 --leader-elect=false""",
}
# The kubelet lets anybody in, as its certificate is nobody's and its network has no one else.
WORKER = {
    "containerd": "containerd --config {folder}/containerd.toml",
    "kubelet": """
        {binaries}/kubelet --kubeconfig={folder}/kubelet.kubeconfig --hostname-override=node1
        --container-runtime=remote --container-runtime-endpoint=unix://{folder}/containerd/socket
        --image-service-endpoint=unix://{folder}/containerd/socket --cgroup-driver=cgroupfs
        --root-dir={folder}/kubelet --cert-dir={folder}/kubelet-pki --address={node} --node-ip={node}
        --fail-swap-on=false --anonymous-auth=true --authorization-mode=AlwaysAllow
        --healthz-bind-address=127.0.0.1 --eviction-hard= --image-gc-high-threshold=100
        --cluster-dns={node} --cluster-domain=cluster.local --resolv-conf= --node-status-update-frequency=2s""",
    "kube-proxy": """
        {binaries}/kube-proxy --kubeconfig={folder}/kcm.kubeconfig --proxy-mode=iptables
        --cluster-cidr=10.78.0.0/24 --hostname-override=node1 --conntrack-max-per-core=0
        --conntrack-tcp-timeout-established=0s --conntrack-tcp-timeout-close-wait=0s""",
    "dnsmasq": """
        dnsmasq --keep-in-foreground --conf-file=/dev/null --no-resolv --no-hosts --user=root --bind-interfaces
        --listen-address={node} --local=/local/ --addn-hosts={folder}/names --local-ttl=0
        --pid-file={folder}/dnsmasq.pid""",
}

Object = dict[str, Any]


@dataclass(frozen=True)
class Kubernetes:
    """A running cluster."""

    folder: Path

    @property
    def kubeconfig(self) -> Path:
        """Credentials of an administrator."""
        return self.folder / "admin.kubeconfig"

    @property
    def authority(self) -> Path:
        """The certificate that the API server made for itself."""
        return self.folder / "pki" / "apiserver.crt"

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """What kubectl prints.

        Raises:
            AssertionError: it fails.
        """
        command = [tools.fetch("kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr[-3000:]}"
        return done.stdout

    def apply(self, *objects: Object) -> None:
        """Apply by the client: at this age a server's own apply refuses ports without a protocol.

        The client's validation asks for what servers before 1.25 do not have.
        """
        self.kubectl("apply", "--validate=false", "--filename=-", stdin=yaml.safe_dump_all(objects))

    def answers(self) -> bool:
        """Whether the API server is up."""
        try:
            return bool(self.read("/api/v1/namespaces/default"))
        except OSError:
            return False

    def has_node(self) -> bool:
        """Whether pods can start."""
        nodes = self.read("/api/v1/nodes")["items"]
        conditions = [each for node in nodes for each in node["status"].get("conditions") or ()]
        return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)

    def read(self, path: str) -> Object:
        """What the API server has at a path."""
        return self.ask(path, TOKEN)

    def ask(self, path: str, token: str, body: Object | None = None) -> Object:
        """The API server's answer to a GET, or with a body to a POST.

        Raises:
            urllib.error.HTTPError: it refuses.
        """
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(SERVER + path, data, headers)
        trust = ssl.create_default_context(cafile=self.authority)
        with urllib.request.urlopen(request, timeout=10, context=trust) as answer:
            found: Object = json.load(answer)
        return found


@contextmanager
def cluster(folder: Path, pause: str) -> Iterator[Kubernetes]:
    """A cluster on the `network` that is ready for pods; `pause` is the image that holds a pod's network."""
    with ExitStack() as stack:
        stack.enter_context(unchanged(*SYSCTLS))
        made = Kubernetes(folder)
        _write_files(folder, pause)
        stack.callback(_clean_up, folder)
        for name, command in (CONTROL_PLANE | WORKER).items():
            # Whatever follows reads the certificate that the API server makes.
            ready = made.answers if name == "kube-apiserver" else lambda: True
            stack.enter_context(_inside(folder, name, command, ready))
        stack.enter_context(_names(made))
        wait(made.has_node, 90, lambda: tail(folder / "kubelet.log"))
        yield made


@contextmanager
def network() -> Iterator[None]:
    """The namespace and its cable; pods and services are routed into it."""
    ip = ("ip", "-n", NAMESPACE)
    before = _namespaces()
    # One that an interrupted session left.
    answers("ip", "netns", "delete", NAMESPACE)
    run("ip", "netns", "add", NAMESPACE)
    try:
        run(*ip, "link", "set", "lo", "up")
        run("ip", "link", "add", CABLE, "type", "veth", "peer", "name", "eth0", "netns", NAMESPACE)
        run(*ip, "address", "add", f"{NODE}/24", "dev", "eth0")
        run(*ip, "link", "set", "eth0", "up")
        run("ip", "address", "add", f"{HOST}/24", "dev", CABLE)
        run("ip", "link", "set", CABLE, "up")
        run(*ip, "route", "add", "default", "via", HOST)
        # The kubelet of this age looks for a cloud's metadata service first.
        run(*ip, "route", "add", "unreachable", "169.254.0.0/16")
        for block in ("10.78.0.0/24", "10.96.0.0/16"):
            run("ip", "route", "add", block, "via", NODE)
        yield
    finally:
        for name in _namespaces() - before | {NAMESPACE}:
            run("ip", "netns", "delete", name)


def _namespaces() -> set[str]:
    """Also each pod has one."""
    return {line.split()[0] for line in run("ip", "netns", "list").splitlines()}


@contextmanager
def _inside(folder: Path, name: str, command: str, ready: Callable[[], bool]) -> Iterator[None]:
    """A daemon in the namespace, with nothing to save; `nsenter`, because `ip netns exec` would hide the cgroups."""
    words = command.format(folder=folder, binaries=KUBERNETES, node=NODE).split()
    with daemon([*INSIDE, *words], folder / f"{name}.log", ready, stop=signal.SIGKILL):
        yield


def _write_files(folder: Path, pause: str) -> None:
    """Keys, tokens, and what configures clients, containerd and the pods' network."""
    (folder / "pki").mkdir(parents=True)
    (folder / "cni").mkdir()
    (folder / "names").touch()
    run("openssl", "genrsa", "-out", f"{folder}/pki/sa.key", "2048")
    run("openssl", "rsa", "-in", f"{folder}/pki/sa.key", "-pubout", "-out", f"{folder}/pki/sa.pub")
    people = [(TOKEN, "admin", "system:masters"), ("e2e-kcm", "system:kube-controller-manager", "system:masters")]
    people.append(("e2e-kubelet", "system:node:node1", "system:nodes,system:masters"))
    lines = [f'{token},{name},{number},"{groups}"' for number, (token, name, groups) in enumerate(people)]
    (folder / "tokens.csv").write_text("\n".join(lines) + "\n")
    for name, token in (("admin", TOKEN), ("kcm", "e2e-kcm"), ("kubelet", "e2e-kubelet")):
        (folder / f"{name}.kubeconfig").write_text(_kubeconfig(folder, token))
    (folder / "cni" / "10-k2e2e.conflist").write_text(json.dumps(_POD_NETWORK))
    (folder / "containerd.toml").write_text(_containerd(folder, pause))


def _kubeconfig(folder: Path, token: str) -> str:
    cluster = {"server": SERVER, "certificate-authority": str(folder / "pki" / "apiserver.crt")}
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "e2e", "cluster": cluster}],
            "users": [{"name": "e2e", "user": {"token": token}}],
            "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": "e2e"}}],
            "current-context": "e2e",
        }
    )


_POD_NETWORK = {
    "cniVersion": "0.4.0",
    "name": "k2e2e",
    "plugins": [
        {
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": True,
            "ipMasq": True,
            "hairpinMode": True,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.78.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]},
        },
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}


def _containerd(folder: Path, pause: str) -> str:
    cri = 'plugins."io.containerd.grpc.v1.cri"'
    absent = ", ".join(f'"io.containerd.snapshotter.v1.{name}"' for name in ("aufs", "btrfs", "devmapper", "zfs"))
    return f"""version = 2
root = "{folder}/containerd/root"
state = "{folder}/containerd/state"
disabled_plugins = [{absent}]
[grpc]
  address = "{folder}/containerd/socket"
[{cri}]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
[{cri}.containerd]
  snapshotter = "overlayfs"
[{cri}.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[{cri}.cni]
  bin_dir = "/usr/lib/cni"
  conf_dir = "{folder}/cni"
[{cri}.registry.mirrors."{REGISTRY}"]
  endpoint = ["http://{REGISTRY}"]
"""


@contextmanager
def _names(made: Kubernetes) -> Iterator[None]:
    """Cluster DNS: no package has CoreDNS, so dnsmasq serves what a thread reads from services and endpoints."""
    ended = threading.Event()

    def follow() -> None:
        known = ""
        while not ended.wait(0.5):
            # A busy server may be late; it is asked again.
            with suppress(OSError):
                found = "\n".join(sorted(_records(made))) + "\n"
                if found != known:
                    (made.folder / "names").write_text(found)
                    run("kill", "-HUP", (made.folder / "dnsmasq.pid").read_text().strip())
                    known = found

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _records(made: Kubernetes) -> Iterator[str]:
    """Lines of a hosts file: services by their address, and the pods that have a name in a headless one."""
    for each in made.read("/api/v1/services")["items"]:
        if each["spec"]["clusterIP"] != "None":
            yield f"{each['spec']['clusterIP']} {_domain(each)}"
    for each in made.read("/api/v1/endpoints")["items"]:
        for subset in each.get("subsets") or ():
            for pod in subset.get("addresses") or ():
                if "hostname" in pod:
                    yield f"{pod['ip']} {pod['hostname']}.{_domain(each)}"


def _domain(thing: Object) -> str:
    return f"{thing['metadata']['name']}.{thing['metadata']['namespace']}.svc.cluster.local"


def _clean_up(folder: Path) -> None:
    """Containers that outlive the kubelet, mounts, cgroups: all under names of this cluster."""
    for shim in Path("/proc").glob("[0-9]*/cmdline"):
        words = shim.read_bytes() if shim.exists() else b""
        if b"containerd-shim" in words and f"{folder}/containerd".encode() in words:
            run("kill", "-KILL", shim.parent.name)
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((path for path in mounts if path.startswith(str(folder))), reverse=True):
        run("umount", "--lazy", mount)
    remove_cgroups("kubepods")
    run("rm", "-rf", str(folder / "containerd"))
