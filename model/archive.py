"""What a ``.pth`` file may be: an archive as ``torch.save`` writes it, of nothing but tensors.

It is checked before torch's unpickler, which need not be trusted alone, sees it.
"""

import pickletools
import re
import struct
import zipfile
from pathlib import Path

import torch

from core.errors import UserError

# All that the table of a state dict may name, beside torch's storages and dtypes.
REBUILT = {"collections OrderedDict", "torch.storage UntypedStorage"}
REBUILT |= {f"torch._utils _rebuild_{end}" for end in ("tensor_v2", "tensor_v3", "parameter")}
REBUILT |= {"torch._utils _rebuild_parameter_with_state"}
REBUILT |= {"torch._utils _rebuild_meta_tensor_no_storage"}
FETCHING = ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")  # what a pickle can call
SETTINGS = r"version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
ENTRY = rf"(?!\.\.?/)[^/\\]+/(data\.pkl|data/\d+|{SETTINGS})"  # in a folder named after the file
MOST_PICKLED = 1 << 20  # bytes: thousands of tensors
END, LOCATOR, RECORD = 22, 20, 56  # bytes of what ends a ZIP file, the last two if it is a ZIP64


def check_archive(path: Path) -> None:
    """Raise ``UserError`` unless ``path`` is an archive of tensors as ``torch.save`` writes it.

    Other errors are those of zipfile, torch's reader and pickletools, on what they cannot read.
    """
    unlike = f"{path} is not a readable weights file"
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = {entry.filename for entry in entries}
        stored = all(e.compress_type == 0 and e.compress_size == e.file_size for e in entries)
        usual = all(re.fullmatch(ENTRY, name) for name in names)
        one = len(names) == len(entries) and len({name.partition("/")[0] for name in names}) == 1
        small = sum(entry.file_size for entry in entries) <= path.stat().st_size
        if not (stored and usual and one and small and has_one_end(path)):
            made = "its archive has compressed, doubled or misplaced entries"
            raise UserError(f"{unlike} ({made}); get it from another source")
        # torch.load does not look at the checksums: a flipped bit would load silently.
        if damaged := archive.testzip():
            raise UserError(f"{path} is damaged (checksum of {damaged}); copy or train it again")
        tables = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if not tables or tables[0].file_size > MOST_PICKLED:
            raise UserError(f"{unlike} (it has no table of tensors); copy or train it again")
        table = archive.read(tables[0])
    if more := more_than_tensors(table):
        raise UserError(f"{unlike} (it holds more than tensors: {more}); do not open it")
    if torch._C.PyTorchFileReader(str(path)).get_record("data.pkl") != table:
        raise UserError(f"{unlike} (its archive can be read in two ways); do not open it")


def has_one_end(path: Path) -> bool:
    """Whether a ZIP file begins with an entry, and its directory is where all readers look."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begins = file.read(4) == b"PK\3\4"
        file.seek(max(0, size - END - LOCATOR))
        tail = file.read()
    locator, end = tail[:LOCATOR], tail[LOCATOR:]
    is_zip64 = locator[:4] == b"PK\6\7"
    place = struct.unpack("<Q", locator[8:16])[0] if is_zip64 else 0
    one = not is_zip64 or place == size - END - LOCATOR - RECORD
    return begins and end[:4] == b"PK\5\6" and one


def more_than_tensors(table: bytes) -> str:
    """What a pickle holds that no state dict needs; empty if there is nothing."""
    tuples, before = set(), ""
    for code, argument, _ in pickletools.genops(table):
        if code.name in FETCHING and not (code.name == "GLOBAL" and is_rebuilt(argument)):
            return str(argument or code.name)
        # Tuples in tuples in tuples: to hash them may take for ever.
        if code.name.endswith("BINPUT") and before.startswith("TUPLE"):
            tuples.add(argument)
        if code.name.endswith("GET") and argument in tuples:
            return "a tuple twice"
        before = code.name
    return ""


def is_rebuilt(named: str) -> bool:
    """Whether tensors are made of it: one of ``REBUILT``, or a storage or dtype of torch."""
    room, _, name = named.partition(" ")
    is_dtype = isinstance(vars(torch).get(name), torch.dtype)
    return named in REBUILT or (room == "torch" and (is_dtype or name.endswith("Storage")))
