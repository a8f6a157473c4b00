"""Builds the images, brings the compose file up, asks every model, sees that in Prometheus, tears down.

    COMPOSE="docker compose" python deploy/compose_test.py

Needs a Docker engine and Compose; takes its host from DOCKER_HOST as they do. What docker-compose.yml reads from the
environment (BASE, PROMETHEUS_IMAGE, BUILD_NETWORK, ...) can be set. Ports are free ones and the project has a name of
its own, so that a running deployment is left alone.
"""

import json
import os
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMPOSE = [*os.environ.get("COMPOSE", "docker compose").split(), "--project-name", "attnd-compose-test"]
ENVIRONMENT = {"TAG": "compose-test", "GATEWAY_PORT": "0", "PROMETHEUS_PORT": "0"} | dict(os.environ)
UP_TIMEOUT_S = 180
SCRAPE_TIMEOUT_S = 60

TEXTS = ["a gripping, funny film", "two hours of my life gone"]
LABELS = ["positive", "negative"]
GENERATIONS = (  # what is asked, and a word that the answer has
    ({"model": "translation", "prompt": "A dog is running."}, "Hund"),
    ({"model": "chat", "messages": [{"role": "user", "content": "What is the capital of France?"}]}, "Paris"),
)
NUM_REQUESTS = 1 + len(GENERATIONS)
REQUESTS = 'sum(attnd_request_seconds_count{{outcome="ok",job="{job}"}})'

# What each image must not have, and that it can neither write nor is anybody.
ABSENT = {"gateway": ["torch", "numpy", "onnxruntime", "tokenizers"], "worker": ["torch", "fastapi"]}
INSIDE = """
import importlib.util, os, sys
assert os.getuid() != 0, "runs as root"
found = [name for name in sys.argv[1:] if importlib.util.find_spec(name)]
assert not found, f"has {found}"
try:
    open("/written", "w")
except OSError:
    pass
else:
    raise AssertionError("the root file system is writable")
"""


def compose(*arguments: str) -> str:
    """Run one compose command and return what it printed. Raises CalledProcessError; stderr passes through."""
    done = subprocess.run(
        [*COMPOSE, *arguments], cwd=ROOT, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.strip()


def address(service: str, port: int) -> str:
    return "http://" + compose("port", service, str(port))


def fetch(url: str, body: object = None) -> Any:
    """The JSON that `url` answers; POST when there is a body. Raises URLError."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} if data else {})
    with urllib.request.urlopen(request, timeout=10) as reply:
        return json.load(reply)


def query(prometheus: str, expression: str) -> list[float]:
    """The values of an instant query."""
    reply = fetch(f"{prometheus}/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
    return [float(sample["value"][1]) for sample in reply["data"]["result"]]


def wait_for(what: str, prometheus: str, expression: str, value: int) -> None:
    """Wait until `expression` is that. Raises TimeoutError that says what did not come true, and what is instead."""
    last = time.monotonic() + SCRAPE_TIMEOUT_S
    while (values := query(prometheus, expression)) != [value]:
        if time.monotonic() > last:
            raise TimeoutError(f"after {SCRAPE_TIMEOUT_S} s still not: {what}; {expression} is {values}, not [{value}]")
        time.sleep(0.5)
    print(f"ok: {what}", flush=True)


def check_classification(gateway: str) -> None:
    reply = fetch(f"{gateway}/v1/classify", {"input": TEXTS})
    best = [scores[0]["label"].lower() for scores in reply["results"]]
    assert best == LABELS, reply
    print(f"ok: classified through gateway and worker as {best}", flush=True)


def check_generations(gateway: str) -> None:
    for asked, word in GENERATIONS:
        reply = fetch(f"{gateway}/v1/generate", {**asked, "max_tokens": 16})
        text = reply["outputs"][0]["text"]
        assert word in text, reply
        print(f"ok: {asked['model']} wrote {text!r}", flush=True)


def check_metrics(prometheus: str) -> None:
    """Both are scraped, and each request is counted where it came in and where it was run."""
    for job in ABSENT:
        wait_for(f"Prometheus scrapes the {job}", prometheus, f'up{{job="{job}"}}', 1)
        wait_for(f"the {job} has counted every request", prometheus, REQUESTS.format(job=job), NUM_REQUESTS)


def check_containers() -> None:
    for service, names in ABSENT.items():
        compose("exec", "-T", service, "python", "-c", INSIDE, *names)
        print(f"ok: the {service} is no root, writes nothing, has no {', '.join(names)}", flush=True)


def check_drain() -> None:
    """SIGTERM ends both with exit code 0, not with a kill after the grace."""
    compose("stop", "gateway", "worker")
    states = map(json.loads, compose("ps", "--all", "--format", "json", "gateway", "worker").splitlines())
    codes = {state["Service"]: state["ExitCode"] for state in states}
    assert codes == {"gateway": 0, "worker": 0}, codes
    print("ok: gateway and worker drained and ended by themselves", flush=True)


def main() -> None:
    try:
        compose("build", "gateway", "worker")
        compose("up", "--detach", "--no-build", "--wait", "--wait-timeout", str(UP_TIMEOUT_S))
        gateway = address("gateway", 8000)
        check_classification(gateway)
        check_generations(gateway)
        check_metrics(address("prometheus", 9090))
        check_containers()
        check_drain()
    except BaseException:
        print(compose("logs", "--no-color", "--tail", "60"), file=sys.stderr)
        raise
    finally:
        compose("down", "--volumes", "--remove-orphans", "--timeout", "30")
    print("compose-test passed")


if __name__ == "__main__":
    main()
