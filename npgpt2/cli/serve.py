"""The command `serve`: a model for other programs, and for the browser."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from threading import Lock
from time import strftime

from npgpt2.cli.common import Commands, Parser, add_command, add_model_to_run, at_least, open_model
from npgpt2.files import decode_utf8, read_bounded

KEY_VARIABLE = "NPGPT2_API_KEY"
LOGGING = Lock()


def port(text: str) -> int:
    """An argument type: a port's number, or 0 for any that is free."""
    digits = text.lstrip("0") or text[:1]
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 5 and int(digits) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is no port, from 0 to 65535")
    return int(digits)


def add_commands(commands: Commands[Parser]) -> None:
    parser = add_command(
        commands,
        "serve",
        run_serve,
        "serve a model over HTTP, as OpenAI's completions, and a page to write on",
        "Takes waitress: pip install npgpt2[serve]. Other programs on this machine can ask, and nobody else, unless"
        " --host says another address. Ctrl-C or SIGTERM lets what runs finish; a second one ends it at once.",
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: %(default)s)")
    parser.add_argument("--port", type=port, default=8000, metavar="N", help="0: any that is free (default: 8000)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument(
        "--slots", type=at_least(1), default=16, metavar="N", help="texts to generate at once (default: %(default)s)"
    )
    parser.add_argument(
        "--queue", type=at_least(0), default=64, metavar="N", help="requests that may wait (default: %(default)s)"
    )
    parser.add_argument(
        "--grace",
        type=at_least(0),
        default=30,
        metavar="SECONDS",
        help="how long requests may go on once the server is to end (default: %(default)s)",
    )
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="PATH",
        help=f"keys, one to a line, of which requests have to give one (default: ${KEY_VARIABLE}, if set)",
    )
    parser.add_argument("--no-key", action="store_true", help="want no key, at whatever address")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which clients call this server, beside localhost; repeatable",
    )
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="whose pages' scripts may ask, as https://example.org, or null for files; repeatable",
    )
    parser.add_argument("--log-prompts", action="store_true", help="show prompts in the log")
    add_model_to_run(parser, drafted=True)


def run_serve(args: argparse.Namespace) -> None:
    from npgpt2.serving.server import app, serve

    address, keys = read_address(args), read_keys(args)
    if not (address.is_loopback or keys or args.no_key):
        ways = f"give a key with --api-key-file or ${KEY_VARIABLE}, or --no-key"
        args.parser.error(f"argument --host: other machines could ask at {args.host}: {ways}")
    model = open_model(args)
    served = app(
        model,
        aliases=[args.model],
        slots=args.slots,
        queue=args.queue,
        api_keys=keys,
        allowed_hosts=[*args.allowed_host, *([] if address.is_unspecified else [str(address)])],
        any_address=address.is_unspecified,
        cors_origins=args.cors_origin,
        log=log,
        log_prompts=args.log_prompts,
    )

    def ready(url: str) -> None:
        print(f"{model.name} at {url}", flush=True)
        if args.open:
            import webbrowser

            webbrowser.open(url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:"))

    number = serve(served, str(address), args.port, args.slots + args.queue, args.grace, log, ready)
    if number == signal.SIGINT:
        raise KeyboardInterrupt


def log(line: str) -> None:
    with LOGGING, suppress(OSError):  # where nobody reads the log any more, requests are answered all the same
        print(f"{strftime('%Y-%m-%d %H:%M:%S')} {line}", file=sys.stderr, flush=True)


def read_address(args: argparse.Namespace) -> IPv4Address | IPv6Address:
    """Where to listen; what is wrong with that, and with names and origins, ends the program as wrong arguments."""
    from npgpt2.serving.server import Guard

    try:
        Guard.of(args.allowed_host, origins=args.cors_origin)
        address = ip_address("127.0.0.1" if args.host == "localhost" else args.host)
    except ValueError as error:
        args.parser.error(f"{error}")
    return address


def read_keys(args: argparse.Namespace) -> list[str]:
    """The keys of which requests have to give one; none where there are none."""
    if args.no_key:
        if args.api_key_file is not None:
            args.parser.error("--no-key and --api-key-file can't both be")
        return []
    if args.api_key_file is None:
        return os.environ.get(KEY_VARIABLE, "").split()
    keys = decode_utf8(read_bounded(args.api_key_file, 2**16), str(args.api_key_file)).split()
    if not keys:
        raise ValueError(f"{args.api_key_file}: has no key")
    return keys
