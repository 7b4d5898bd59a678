"""Names that are written into files, and read back by parts that mustn't import each other."""

QUANT_METHOD = "moe_compress"
# The newest that this package reads. What is written is the oldest that knows what is in the file: 3 where experts have
# other widths than config.json says, 2 where matrices beside the experts are packed, else 1.
FORMAT_VERSION = 3

# What servers read, and what its own field `quant_method` calls it.
COMPRESSED_TENSORS = "compressed-tensors"
GPTQ = "gptq"

# llama.cpp's format, and the file of that format in a result's folder.
GGUF = "gguf"
GGUF_FILE = "model.gguf"
