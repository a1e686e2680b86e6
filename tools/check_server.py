"""Is a server this model? `python tools/check_server.py ADDRESS --model DIR`.

Sends the checkpoint's golden rows and compares what comes back with their scores: the right model,
raw rewards, the right tokens. Exit status 0 only if all of it is right.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import sys

from polar_xtuner.client import RewardModelClient
from polar_xtuner.connection import Limits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="host:port, several with commas")
    parser.add_argument("--model", required=True, metavar="DIR", help="what it should serve")
    parser.add_argument("--server-type", default="sglang", help="sglang, vllm or lmdeploy")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="what the server computes in; default: the checkpoint's own",
    )
    parser.add_argument("--served-model", metavar="NAME", help="default: the one it tells")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get("POLAR_API_KEY"),
        help="sent as a bearer token; default: $POLAR_API_KEY",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and no more")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with RewardModelClient(
            args.model,
            server_type=args.server_type,
            server_address=args.address,
            model=args.served_model,
            api_key=args.api_key or None,
            verify=False,
            limits=Limits(max_retries=2),  # who checks wants to know soon that it is not there
        ) as client:
            servers = {url: str(facts) for url, facts in client.servers().items()}
            found = client.verify(args.dtype)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"check_server.py: {error}")
    if args.json:
        figures = {"servers": servers, **dataclasses.asdict(found)}
        if not math.isfinite(found.max_difference):  # JSON has no infinity
            figures["max_difference"] = None
        print(json.dumps(figures))
    else:
        shown = ", ".join(f"{url} ({facts})" for url, facts in servers.items())
        print(
            f"{shown} is {'' if found.ok else 'NOT '}{args.model}: "
            f"{found.n} golden rewards are off by up to {found.max_difference:.2g}, allowed in "
            f"{found.dtype} is {found.tolerance:.2g}"
        )
        for remark in [*found.problems, *found.warnings]:
            print(f"  {remark}")
    sys.exit(not found.ok)


if __name__ == "__main__":
    main()
