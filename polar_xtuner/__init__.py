"""Fine-tune POLAR reward models with xtuner, and score with them.

Importing this package, and everything a scoring client needs, imports neither torch nor
xtuner: training lives in modules that are imported by name (`polar_xtuner.engine`).
"""

__version__ = "0.1.0"
