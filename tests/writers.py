"""Writers for the formats that npgpt2 reads, which can also write what no honest program would."""

import io
import json
import re
import struct
import zipfile

import numpy as np
from builders import SMALL, VOCABULARY, random_arrays  # noqa: F401

from npgpt2.convert.crc32c import crc32c

# ---- TensorFlow's checkpoints: LevelDB's table_format.md, TensorFlow's tensor_bundle.proto

DTYPES = {"float32": 1, "float64": 2, "int32": 3, "bfloat16": 14, "float16": 19}


def masked(crc):
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(value):
    """An integer in groups of 7 bits; negative ones as protocol buffers write them, in ten bytes."""
    value &= 2**64 - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number, value):
    """A field of a protocol buffer: a varint from an int, a fixed32 from a float's stand-in (crc,), else bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, tuple):
        return varint(number << 3 | 5) + struct.pack("<I", *value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def header(shards=1, endianness=0):
    return field(1, shards) + (field(2, endianness) if endianness else b"") + field(3, field(1, 1))


def entry(dtype=1, shape=(), shard=0, offset=0, size=0, crc=0):
    dims = b"".join(field(2, field(1, dim)) for dim in shape)
    numbers = b"".join(field(number, value) for number, value in ((3, shard), (4, offset), (5, size)) if value)
    return field(1, dtype) + field(2, dims) + numbers + field(6, (masked(crc),))


def block(pairs, interval=16):
    """A table's block: keys without what they share with the one before, but for every sixteenth."""
    out, restarts, previous = bytearray(), [], b""
    for number, (key, value) in enumerate(pairs):
        shared = 0
        if number % interval == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(previous)) and key[shared] == previous[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        previous = key
    restarts = restarts or [0]
    return bytes(out) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def sealed(contents, compression=0):
    """A block with its trailer: how it is compressed, and its checksum."""
    contents += bytes([compression])
    return contents + struct.pack("<I", masked(crc32c(contents)))


def footer(meta, index):
    handles = b"".join(varint(number) for handle in (meta, index) for number in handle)
    return handles.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def assemble(blocks, handles=None, compression=0):
    """A table of finished blocks. `handles`: what the index says instead of where they are, (offset, size) of each."""
    out, places = b"", []
    for contents in blocks:
        places.append((len(out), len(contents)))
        out += sealed(contents, compression)
    meta = (len(out), len(block([])))
    out += sealed(block([]))
    lines = [(struct.pack(">I", n), varint(at) + varint(size)) for n, (at, size) in enumerate(handles or places)]
    index = block(lines, interval=1)
    return out + sealed(index) + footer(meta, (len(out), len(index)))


def table(pairs, per_block=1000, interval=16):
    pairs = list(pairs)
    return assemble([block(pairs[at : at + per_block], interval) for at in range(0, len(pairs), per_block)])


def write_checkpoint(prefix, arrays, shards=1, per_block=1000):
    """Write arrays as TensorFlow would; a pair ("bfloat16", uint16 array) says the type that NumPy doesn't have."""
    pairs, data = [(b"", header(shards))], [bytearray() for _ in range(shards)]
    for number, name in enumerate(sorted(arrays)):
        array = arrays[name]
        dtype, array = array if isinstance(array, tuple) else (array.dtype.name, array)
        raw, shard = array.tobytes(), number % shards
        place = {"shard": shard, "offset": len(data[shard]), "size": len(raw), "crc": crc32c(raw)}
        pairs.append((name.encode(), entry(DTYPES[dtype], array.shape, **place)))
        data[shard] += raw
    prefix.with_name(f"{prefix.name}.index").write_bytes(table(pairs, per_block))
    for number, raw in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{number:05}-of-{shards:05}").write_bytes(raw)


# ---- Hugging Face's


def safetensors(tensors, metadata=None):
    """The bytes of a safetensors file. tensors: name -> array, or (type, array) for what NumPy doesn't have."""
    kinds = {"float32": "F32", "float16": "F16", "float64": "F64", "uint8": "U8", "bool": "BOOL"}
    described, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, array in tensors.items():
        kind, array = array if isinstance(array, tuple) else (kinds[array.dtype.name], array)
        raw = array.tobytes()
        described[name] = {"dtype": kind, "shape": array.shape, "data_offsets": (len(data), len(data) + len(raw))}
        data += raw
    return safetensors_header(described) + data


def safetensors_header(described):
    text = described if isinstance(described, bytes) else json.dumps(described).encode()
    return struct.pack("<Q", len(text)) + text


# ---- What torch.save writes


class Name(str):
    """Something in Python or PyTorch that a pickle names, such as "torch Size"."""


class Call:
    """A call of a `Name` in a pickle."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments


class Persistent:
    """What a pickle asks for that is outside of it; PyTorch describes storages so."""

    def __init__(self, *described):
        self.described = described


class View:
    """A tensor that is a view of a storage: a flat array, or (type, array) for what NumPy doesn't have."""

    def __init__(self, storage, shape, strides, offset=0):
        self.storage, self.shape, self.strides, self.offset = storage, shape, strides, offset


STORAGES = {"float32": "Float", "float16": "Half", "float64": "Double", "bfloat16": "BFloat16", "int64": "Long",
            "int32": "Int", "int16": "Short", "int8": "Char", "uint8": "Byte", "bool": "Bool"}  # fmt: skip


def pickled(value, stop=True):
    """The pickle of a value, as protocol 2 has it, but that nothing is remembered."""
    if isinstance(value, Name):
        return b"c" + value.replace(" ", "\n", 1).encode() + b"\n" + b"." * stop
    if value is None or isinstance(value, bool):
        text = {None: b"N", True: b"\x88", False: b"\x89"}[value]
    elif isinstance(value, int):
        text = (
            struct.pack("<Bi", ord("J"), value)
            if -(2**31) <= value < 2**31
            else b"\x8a\x20" + value.to_bytes(32, "little", signed=True)
        )
    elif isinstance(value, float):
        text = struct.pack(">cd", b"G", value)
    elif isinstance(value, str):
        text = struct.pack("<cI", b"X", len(value.encode())) + value.encode()
    elif isinstance(value, tuple):
        text = b"(" + b"".join(pickled(item, False) for item in value) + b"t"
    elif isinstance(value, list):
        text = b"](" + b"".join(pickled(item, False) for item in value) + b"e"
    elif isinstance(value, dict):
        text = b"}(" + b"".join(pickled(item, False) for pair in value.items() for item in pair) + b"u"
    elif isinstance(value, Call):
        text = pickled(value.name, False) + pickled(value.arguments, False) + b"R"
    else:
        text = pickled(value.described, False) + b"Q"
    return text + b"." * stop


def described(saved, storages):
    """The same values, with tensors as PyTorch's pickles have them; their storages are added to a dictionary by key."""
    if isinstance(saved, dict):
        return {key: described(value, storages) for key, value in saved.items()}
    if isinstance(saved, Call):
        return Call(saved.name, *(described(value, storages) for value in saved.arguments))
    kind = saved[0] if isinstance(saved, tuple) and saved and isinstance(saved[0], str) else None
    if hasattr(saved, "dtype") or kind in STORAGES:
        array = saved if kind is None else saved[1]
        strides = tuple(stride // array.itemsize for stride in np.empty(array.shape, array.dtype).strides)
        flat = array.reshape(-1)
        saved = View(flat if kind is None else (kind, flat), array.shape, strides)
    if not isinstance(saved, View):
        return saved
    kind, array = saved.storage if isinstance(saved.storage, tuple) else (saved.storage.dtype.name, saved.storage)
    place = array.ctypes.data, array.size
    same = (key for key, (_, known) in storages.items() if (known.ctypes.data, known.size) == place)
    key = next(same, str(len(storages)))
    storages[key] = kind, array
    storage = Persistent("storage", Name(f"torch {STORAGES[kind]}Storage"), key, "cpu", array.size)
    hooks = Call(Name("collections OrderedDict"))
    rebuild = Name("torch._utils _rebuild_tensor_v2")
    return Call(rebuild, storage, saved.offset, tuple(saved.shape), tuple(saved.strides), False, hooks)


def torch_members(saved, root="archive"):
    """What the zip file of torch.save has: bytes by name."""
    storages = {}
    text = b"\x80\x02" + (saved if isinstance(saved, bytes) else pickled(described(saved, storages)))
    members = {"data.pkl": text, "byteorder": b"little"}
    members |= {f"data/{key}": array.tobytes() for key, (_, array) in storages.items()}
    return {f"{root}/{name}": data for name, data in (members | {"version": b"3\n"}).items()}


def torch_zip(members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return file.getvalue()


def torch_saved(saved):
    """The bytes of a file of torch.save. saved: values and containers, and arrays or `View`s for tensors."""
    return torch_zip(torch_members(saved))


def torch_legacy(saved, **changes):
    """The same in the format before PyTorch 1.6. changes: to the system that it was written on."""
    storages = {}
    text = pickled(described(saved, storages))
    magic, keys = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", pickled(list(storages))
    system = pickled({"protocol_version": 1001, "little_endian": True} | changes)
    out = b"".join(b"\x80\x02" + part for part in (magic, pickled(1001), system, text, keys))
    return out + b"".join(struct.pack("<q", array.size) + array.tobytes() for _, array in storages.values())


def nanogpt_checkpoint(arrays=None, hparams=SMALL, prefix="_orig_mod.transformer.", **changes):
    """What nanoGPT saves: the weights of linear layers are (out, in), and the output projection is the embedding."""
    tensors = {}
    for name, array in (arrays or random_arrays(hparams)).items():
        tensors[hf_name(name, prefix)] = np.ascontiguousarray(array.T) if name.endswith("/w") else array
    tensors[f"{prefix.removesuffix('transformer.')}lm_head.weight"] = tensors[f"{prefix}wte.weight"]
    sizes = {"n_layer": hparams.n_layer, "n_head": hparams.n_head, "n_embd": hparams.n_embd}
    sizes |= {"block_size": hparams.n_ctx, "vocab_size": hparams.n_vocab, "bias": True, "dropout": 0.0}
    moments = {n: {"step": np.float32(4), "exp_avg": array + 1} for n, array in enumerate(tensors.values())}
    optimizer = {
        "state": moments,
        "param_groups": [{"lr": 6e-4, "betas": (0.9, 0.95), "fused": None, "params": [0, 1]}],
    }
    checkpoint = {"model": tensors, "optimizer": optimizer, "model_args": sizes, "iter_num": 2000}
    return checkpoint | {"best_val_loss": np.array(1.5, np.float32), "config": {"out_dir": "out"}} | changes


# ---- Zip files

# Where fields lie in the headers that zip files have in the middle (local) and at the end (central): offset, format.
LOCAL = {"flags": (6, "<H"), "method": (8, "<H"), "crc": (14, "<I"), "compressed": (18, "<I"), "size": (22, "<I"),
         "name_length": (26, "<H"), "extra_length": (28, "<H")}  # fmt: skip
CENTRAL = {"version": (6, "<H"), "flags": (8, "<H"), "method": (10, "<H"), "crc": (16, "<I"), "compressed": (20, "<I"),
           "size": (24, "<I"), "name_length": (28, "<H"), "extra_length": (30, "<H"), "offset": (42, "<I")}  # fmt: skip


def central_start(data):
    """Where a zip file's central directory begins."""
    return struct.unpack_from("<I", data, data.rindex(b"PK\5\6") + 16)[0]


def zip_header(data, name, central=True):
    """Where the header of a member begins."""
    start = central_start(data) if central else 0
    name_at = data.index(name.encode(), start) if central else data.index(name.encode())
    return name_at - (46 if central else 30)


def patched(data, name, central=True, **values):
    """A zip file's bytes with fields of a member's header changed."""
    data = bytearray(data)
    start = zip_header(bytes(data), name, central)
    for key, value in values.items():
        offset, kind = (CENTRAL if central else LOCAL)[key]
        struct.pack_into(kind, data, start + offset, value)
    return bytes(data)


def with_zip64_offset(data, name, offset):
    """A zip file's bytes with a member's place given in the long form, which holds any number of 64 bits."""
    start = zip_header(data, name)
    name_length, extra_length = struct.unpack_from("<HH", data, start + 28)
    extra = struct.pack("<HHQ", 1, 8, offset)
    data = patched(data, name, offset=0xFFFFFFFF, extra_length=extra_length + len(extra))
    data = data[: start + 46 + name_length] + extra + data[start + 46 + name_length :]
    end = data.rindex(b"PK\5\6")
    (size,) = struct.unpack_from("<I", data, end + 12)
    return data[: end + 12] + struct.pack("<I", size + len(extra)) + data[end + 16 :]


def with_zip64_end(data, size, offset):
    """A zip file's bytes with the size and place of its central directory given in the long form."""
    end = data.rindex(b"PK\5\6")
    (count,) = struct.unpack_from("<H", data, end + 10)
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, offset)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    return (
        data[:end]
        + record
        + locator
        + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 2**16 - 1, 2**16 - 1, *[2**32 - 1] * 2, 0)
    )


# ---- Folders

CONFIG = {"model_type": "gpt2", "vocab_size": 11, "n_positions": 5, "n_embd": 8, "n_head": 2, "n_layer": 2}


def hf_name(name, prefix="transformer."):
    """What Hugging Face calls a variable."""
    name = re.sub(r"^h(\d+)", r"h.\1", name).replace("/", ".")
    name = re.sub(r"\.b$", ".bias", re.sub(r"\.[wg]$", ".weight", name))
    return prefix + (f"{name}.weight" if name in ("wte", "wpe") else name)


def hf_tensors(arrays=None, prefix="transformer."):
    return {hf_name(name, prefix): array for name, array in (arrays or random_arrays()).items()}


def write_hugging_face(folder, tensors=None, config=CONFIG):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(safetensors(hf_tensors() if tensors is None else tensors))
    return folder


def as_saved(arrays):
    """Variables as OpenAI's checkpoints have them: under `model/`, matrices of linear layers as convolutions."""
    return {f"model/{name}": array[None] if name.endswith("/w") else array for name, array in arrays.items()}


def write_openai(folder, arrays=None, hparams=SMALL, prefix="model.ckpt", **more):
    """A folder as OpenAI's downloads are, without a vocabulary."""
    folder.mkdir(exist_ok=True)
    write_checkpoint(folder / prefix, as_saved(arrays or random_arrays()), **more)
    if hparams is not None:
        (folder / "hparams.json").write_text(json.dumps(hparams._asdict()))
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "{prefix}"\n')
    return folder
