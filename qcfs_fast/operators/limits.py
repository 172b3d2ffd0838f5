"""Every number that bounds what the integer kernels take, in one place."""

MAX_WEIGHT = 32639  # 127 * 256 + 127: two signed base-256 digits
MAX_THRESHOLD = 2**24  # units; beyond, nothing is gained
MAX_SUM = 2**31 - 1  # of a membrane
MAX_COUNT = 255  # of a count plane's byte
MAX_SOURCES = 64  # inputs, and residuals, of one spiking layer
ANALOG_RANGE = 64  # an analog current beside spikes is clipped at this many thresholds
