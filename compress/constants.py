"""Names that are written into files, and read back by parts that mustn't import each other."""

QUANT_METHOD = "moe_compress"
# The newest that this package reads. Written is the oldest that knows all that is there: 1 for experts alone, 2 where
# matrices beside them are packed, 3 where rules stand between routers and experts, or experts have other widths than
# config.json says.
FORMAT_VERSION = 3

# What servers read, and what its own field `quant_method` calls it.
COMPRESSED_TENSORS = "compressed-tensors"
GPTQ = "gptq"

# llama.cpp's format, and the file of that format in a result's folder.
GGUF = "gguf"
GGUF_FILE = "model.gguf"
