"""For verl's external_lib, which imports a module in every worker and does nothing else: importing this one registers the losses of `verl.py`."""

from athanor.adapters.verl import register_losses

register_losses()
