"""The same engine under Ray Serve: replicas anywhere in a cluster, behind one address.

    pip install 'unolora[serve]' 'ray[serve]'
    python examples/ray_serve.py runs/quickstart --replicas 2

Without a cluster at hand (RAY_ADDRESS), Ray starts a local one. The run's folder must be there on every machine, as on
a shared disk. All routes of `unolora serve` are there, and the page; keys and limits are flags of the same settings.
"""

import argparse
from pathlib import Path

from ray import serve


def deployment(run: Path, *, replicas: int = 1, cpus: float = 1, gpus: float = 0):
    """A deployment of the application; its engine batches what reaches a replica."""

    def application():  # in each replica
        from unolora.runs import load_run
        from unolora.serving import server
        from unolora.serving.settings import ServeSettings

        # Ray's proxy listens, not this: who may reach it is decided there, or by `keys=`.
        return server.application(load_run(run), ServeSettings(host="0.0.0.0", insecure=True))

    options = {"num_cpus": cpus, "num_gpus": gpus}
    return serve.deployment(
        serve.ingress(application)(),
        name="unolora",
        num_replicas=replicas,
        ray_actor_options=options,
        max_ongoing_requests=256,  # Ray's default of 5 would leave nothing to batch
        graceful_shutdown_timeout_s=60,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--cpus", type=float, default=1, help="of a replica")
    parser.add_argument("--gpus", type=float, default=0, help="of a replica")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    serve.start(http_options={"host": options.host, "port": options.port})
    made = deployment(options.run.resolve(), replicas=options.replicas, cpus=options.cpus, gpus=options.gpus)
    serve.run(made.bind(), name="unolora", blocking=True)


if __name__ == "__main__":
    main()
