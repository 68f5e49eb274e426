"""python -m bench.report"""

from ..measure.session import start
from .rebuild import main

if __name__ == "__main__":
    start("bench.report", main)
