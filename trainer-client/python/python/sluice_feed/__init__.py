from sluice_feed._core import Batch
