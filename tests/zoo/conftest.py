"""Nothing is downloaded: the packages are told so before they are imported."""

import os

from tests.zoo import third_party

os.environ["HF_HUB_OFFLINE"] = "1"
third_party.prepare()
