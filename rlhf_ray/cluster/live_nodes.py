"""Prints the living nodes of the Ray cluster that there is, as a line of JSON."""

import json
import logging

import ray


def main() -> None:
    """Join, ask, leave."""
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    print(json.dumps([node for node in ray.nodes() if node["Alive"]], default=str))


if __name__ == "__main__":
    main()
