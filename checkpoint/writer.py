"""Makes a checkpoint visible once it is whole, and removes those that are not kept. For rank 0."""

import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from checkpoint.directory import Retention, require_space, step_directories, step_name, temporary_name_of, tidy
from checkpoint.manifest import MANIFEST_NAME, REPLACED, Chunk, Manifest, encode_manifest
from checkpoint.tensor_files import WrittenFile
from runtime.fault_injection import Passing, no_faults
from runtime.files import sync, write_whole


class CheckpointWriter:
    """Writes `<directory>/step_XXXXXXXX` so that it is either complete or invisible, then removes what is not kept.

    Rank 0 begins, ranks write into a temporary directory, and rank 0 finishes: it writes the manifest last, renames the
    directory, points `latest` to it, and removes older checkpoints. Methods raise OSError where storage fails.

    A process that stood still for minutes may find that another has taken over its run directory. Rank 0 therefore asks
    `require_owner` before each change that others see; it raises RunDirectoryError in that case.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        keep: Retention,
        passing: Passing = no_faults,
        require_owner: Callable[[], None] = lambda: None,
    ) -> None:
        """`manifest` says step and state, and the tensors without their chunks."""
        self.target = directory / step_name(manifest.step)
        self._temporary = temporary_name_of(self.target)
        self._directory = directory
        self._manifest = manifest
        self._keep = keep
        self._passing = passing
        self._require_owner = require_owner

    def begin(self, size: int) -> Path:
        """Make the temporary directory for ranks to write `size` bytes into, and return it.

        Raises ValueError or TypeError for a state that is not finite JSON.
        """
        encode_manifest(self._manifest)
        self._require_owner()
        # No parents: where the run directory has just been moved away, none is begun in its place.
        self._directory.mkdir(exist_ok=True)
        tidy(self._directory)
        require_space(self._directory, size)
        self._temporary.mkdir()
        return self._temporary

    def finish(self, wrote: list[WrittenFile | None]) -> list[None]:
        """Write the manifest, make the checkpoint visible, and remove those that are not to be kept."""
        chunks: dict[str, list[Chunk]] = defaultdict(list)
        files = [file for file in wrote if file is not None]
        for name, chunk in [pair for file in files for pair in file.chunks]:
            chunks[name].append(chunk)
        tensors = {name: replace(entry, chunks=tuple(chunks[name])) for name, entry in self._manifest.tensors.items()}
        manifest = replace(self._manifest, files={file.name: file.entry for file in files}, tensors=tensors)
        self._passing("checkpoint.manifest")
        write_whole(self._temporary / MANIFEST_NAME, encode_manifest(manifest))
        self._passing("checkpoint.rename")
        self._require_owner()
        replaced = self.target.with_name(self.target.name + REPLACED)
        if self.target.exists():
            self.target.rename(replaced)
        self._temporary.rename(self.target)
        sync(self._directory)
        sync(self._directory.parent)
        self._require_owner()
        write_whole(self._directory / "latest", f"{self.target.name}\n".encode())
        self._passing("checkpoint.prune")
        self._require_owner()
        shutil.rmtree(replaced, ignore_errors=True)
        self._remove_others()
        return [None] * len(wrote)

    def _remove_others(self) -> None:
        found = [pair for pair in step_directories(self._directory) if pair[0] <= self._manifest.step]
        complete = [pair for pair in found if (pair[1] / MANIFEST_NAME).is_file()]
        kept = self._keep.of(complete)
        for _, path in found:
            if path not in kept:
                # Renamed first, so that a checkpoint that is half removed is invisible.
                shutil.rmtree(path.rename(temporary_name_of(path)), ignore_errors=True)
