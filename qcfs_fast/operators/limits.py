"""Every number that bounds what the integer kernels take, in one place."""

MAX_WEIGHT = 32639  # 127 * 256 + 127: two signed base-256 digits
MAX_THRESHOLD = 2**24  # units; beyond, nothing is gained
MAX_SUM = 2**31 - 1  # of a membrane
MAX_COUNT = 255  # of a count plane's byte
# Inputs of an image row times T on the CPU. List offsets are uint32, and padding lists to multiples of four can use
# five entries for an input: 5 * 2**29 < 2**32.
MAX_LISTED = 2**29
MAX_SOURCES = 64  # inputs, and residuals, of one spiking layer
ANALOG_RANGE = 64  # an analog current beside spikes is clipped at this many thresholds
