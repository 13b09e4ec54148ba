"""The tensors of a Hugging Face directory under our names, read where they lie in mapped files."""

import re
from collections.abc import Mapping, Sequence

import torch
from safetensors import SafetensorError, safe_open

from models.hugging_face import HEAD, WORDS, HuggingFaceDirectory, TensorRule
from parallel.sharding import local_box, local_values
from runtime.errors import HuggingFaceError
from runtime.files import safetensors_header

DTYPES = ("F64", "F32", "F16", "BF16")


class HuggingFaceWeights:
    """Views of the files' tensors: only the pages that are touched are read.

    Args:
        shapes: of every parameter of the model, whole, by global name.

    Raises HuggingFaceError naming files that are damaged and tensors that are missing, unknown, of another shape or of
    a dtype that is no plain floating point.
    """

    def __init__(self, directory: HuggingFaceDirectory, shapes: Mapping[str, torch.Size]) -> None:
        family = directory.family
        self._shapes = shapes
        self._files = _open(directory)
        self.base = family.base if any(name.startswith(family.base) for name in self._files) else ""
        """What the names in the files start with."""
        rules = family.tensor_rules(shapes, directory.model.num_layers, self.base)
        self._rules = {name: rule for rule in rules for name in rule.ours}
        problems = [problem for rule in rules for problem in self._problems(rule)]
        (head,) = (rule.theirs for rule in family.tensor_rules([HEAD], 1, self.base))
        self.repeats_head = HEAD not in shapes and head in self._files
        """Whether the output head is stored though it is tied to the embedding."""
        unknown = sorted(self._files.keys() - {rule.theirs for rule in rules} - {head})
        ignored = re.compile(family.ignored)
        problems += [f"{name} is unknown" for name in unknown if not ignored.fullmatch(name.removeprefix(self.base))]
        if self.repeats_head and not problems and not torch.equal(self._files[head].get_tensor(head), self[WORDS]):
            problems.append(f"{head} differs from the embedding that tie_word_embeddings says it is")
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise HuggingFaceError(f"{directory.path}: {'; '.join(problems[:5])}{more}")

    def __getitem__(self, name: str) -> torch.Tensor:
        """A whole parameter by our name, in the file's dtype: a view of mapped memory."""
        rule = self._rules[name]
        stored = self._files[rule.theirs].get_tensor(rule.theirs)
        rows = stored.t() if rule.transposed else stored
        start = sum(self._shapes[other][0] for other in rule.ours[: rule.ours.index(name)])
        return rows.narrow(0, start, self._shapes[name][0])

    @torch.no_grad()
    def copy_to(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Fill this rank's shards of parameters, in whatever layout, dtype and device they are."""
        for name, parameter in parameters.items():
            box = local_box(parameter, self._shapes[name])
            local_values(parameter, box).copy_(self[name][box.slices])

    def _problems(self, rule: TensorRule) -> list[str]:
        if rule.theirs not in self._files:
            return [f"{rule.theirs} is missing"]
        stored = self._files[rule.theirs].get_slice(rule.theirs)
        found, expected, dtype = stored.get_shape(), list(rule.shape(self._shapes)), stored.get_dtype()
        problems = [f"{rule.theirs} has shape {found}, config.json asks for {expected}"] if found != expected else []
        return problems + ([f"{rule.theirs} is of dtype {dtype}"] if dtype not in DTYPES else [])


def join(rule: TensorRule, ours: Sequence[torch.Tensor]) -> torch.Tensor:
    """Their tensor, made of ours."""
    stacked = torch.cat(list(ours)) if len(ours) > 1 else ours[0]
    return (stacked.t() if rule.transposed else stacked).contiguous()


def _open(directory: HuggingFaceDirectory) -> dict[str, safe_open]:
    """The open file of every stored tensor."""
    files: dict[str, safe_open] = {}
    for path in directory.files:
        try:
            file = safe_open(path, framework="pt")
            safetensors_header(path)
        except (OSError, SafetensorError, ValueError) as error:
            raise HuggingFaceError(f"{path} is damaged: {error}") from error
        names = set(file.keys())
        if names & files.keys():
            raise HuggingFaceError(f"{path} holds {min(names & files.keys())}, as another file of the index does")
        files |= dict.fromkeys(names, file)
    return files
