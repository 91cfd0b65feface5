"""What a pod mounts beside its recipe: folders of buckets, to be read, and claims, to be written too.

A bucket comes through GKE's Cloud Storage FUSE driver, which must be on in the cluster, and is read as the pod's
service account. It is read only: what a run writes grows line by line, which objects of a bucket do not.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
from collections.abc import Sequence
from typing import Any

from fathom.cli_problem import ArgumentProblem

RECIPE_FOLDER = "/etc/fathom"
"""Where the recipe is mounted."""

POD_ANNOTATIONS = {"gke-gcsfuse/volumes": "true"}
"""Has GKE put the driver's container beside those of a pod that mounts a bucket."""

BUCKET = r"gs://[a-z0-9][-a-z0-9_.]{1,220}[a-z0-9](/[^\s,:]+)?"
"""A comma or a colon in a folder's name would end it among the driver's options."""

OBJECT = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
"""The name of a claim, or of another object of Kubernetes."""

PATH = r"(/(?!\.{1,2}(/|$))[^/\s:]+)+"


@dataclasses.dataclass(frozen=True)
class Volume:
    """One of a pod's mounts.

    Attributes:
      source: gs://BUCKET or gs://BUCKET/FOLDER, read only, or the name of a PersistentVolumeClaim.
      path: where it is mounted, absolute.
    """

    source: str
    path: str

    @property
    def is_bucket(self) -> bool:
        return self.source.startswith("gs://")

    def holds(self, path: str) -> bool:
        """Whether a path lies on it."""
        return f"{posixpath.normpath(path)}/".startswith(f"{self.path}/")

    def manifest(self, name: str) -> dict[str, Any]:
        """The item of a pod's `volumes`."""
        if not self.is_bucket:
            return {"name": name, "persistentVolumeClaim": {"claimName": self.source}}
        bucket, _, folder = self.source.removeprefix("gs://").partition("/")
        # Folders that were never made as such, which is how most programs write buckets, are seen too.
        options = "implicit-dirs" + (f",only-dir={folder}" if folder else "")
        attributes = {"bucketName": bucket, "mountOptions": options}
        return {
            "name": name,
            "csi": {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": True, "volumeAttributes": attributes},
        }

    def mount(self, name: str) -> dict[str, Any]:
        """The item of a container's `volumeMounts`."""
        return {"name": name, "mountPath": self.path, "readOnly": self.is_bucket}


def volume_of(path: str, volumes: Sequence[Volume]) -> Volume | None:
    """The one that a path lies on."""
    return next((volume for volume in volumes if volume.holds(path)), None)


def read_volumes(mounts: Sequence[str], claims: Sequence[str]) -> tuple[Volume, ...]:
    """The volumes of --mount gs://BUCKET[/FOLDER]=/PATH and --volume CLAIM=/PATH.

    Raises:
      ArgumentProblem: naming everything wrong: what has another form, and paths that lie in each other.
    """
    volumes, problems = [], []
    for option, texts, source_form, expected in (
        ("--mount", mounts, BUCKET, "gs://BUCKET=/PATH or gs://BUCKET/FOLDER=/PATH"),
        ("--volume", claims, OBJECT, "CLAIM=/PATH, the name of a PersistentVolumeClaim"),
    ):
        for text in texts:
            source, _, path = text.rpartition("=")
            volume = Volume(source.rstrip("/"), path.rstrip("/"))
            if not re.fullmatch(source_form, volume.source) or not re.fullmatch(PATH, volume.path):
                problems.append(f"{option} is {text!r}, expected {expected}, the path absolute; correct it")
                continue
            others = [*volumes, Volume("the recipe", RECIPE_FOLDER)]
            if there := next((v for v in others if v.holds(volume.path) or volume.holds(v.path)), None):
                problems.append(f"{option} {text}: {there.path} is where {there.source} lies; choose a path beside it")
                continue
            volumes.append(volume)
    if problems:
        raise ArgumentProblem("; ".join(problems))
    return tuple(volumes)
