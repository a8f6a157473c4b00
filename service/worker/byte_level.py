"""The alphabet of byte-level BPE, in which tokenizer.json writes a token's bytes."""


def byte_alphabet() -> dict[int, int]:
    """GPT-2's characters for bytes (Radford et al. 2019): printable Latin-1 for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {0x100 + place: byte for place, byte in enumerate(others)}
