"""`exitsafe serve`: a model -> every exit of it behind an OpenAI-compatible server, until it is stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
from ipaddress import ip_address

from exitsafe.cli import console
from exitsafe.errors import InputError
from exitsafe.specs.verbs import ServeSpec

_KEY = "EXITSAFE_API_KEY"


def serve_command(spec: ServeSpec, show: console.Show) -> None:
    """Serve every exit of a model as a separate model of one OpenAI-compatible server.

    NAME@L9 is exit 9, NAME the default exit. Answers are not filtered. Ctrl-C stops the server, with exit status 0.
    """
    from exitsafe.serve.app import Service, fingerprint, make_server, served_models  # says what is missing
    from exitsafe.serve.worker import Worker

    listening = _listen(spec.host, spec.port)
    from exitsafe.cli.models import load_model

    key, is_local = os.environ.get(_KEY) or None, ip_address(listening.getsockname()[0]).is_loopback
    if key is None and not is_local:
        console.note(f"warning: anyone who can reach {spec.host} can use this model; set {_KEY} to require a key")
    vlm = load_model(spec.model, spec.loading)
    models = served_models(vlm)
    url = _url(listening)
    worker = Worker(vlm)
    service = Service(
        worker=worker, models=models, fingerprint=fingerprint(vlm), key=key, is_local=is_local, log=console.note
    )
    default, *exits = models
    document = {"url": url, "models": [default, *exits], "default_exit": vlm.default_exit}
    if show.as_json:  # one line: the reader waits for this one only
        show.stdout.write(json.dumps(document) + "\n")
        show.stdout.flush()
    else:
        show(document, lambda: [f"ready: {url} serves {default} (exit {vlm.default_exit}), {exits[0]} to {exits[-1]}"])
    for number in (signal.SIGINT, signal.SIGTERM):  # the server stops at them, then raises them again
        signal.signal(number, signal.SIG_IGN)
    try:
        make_server(service).run(sockets=[listening])
    finally:
        worker.close()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens before the model is loaded: a port that is taken is found at once, early requests wait."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, number)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot listen on {host}, port {port} ({reason}); choose another --host or --port") from error
    return listening


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
