"""Run folders -> figures and one self-contained HTML page: a run's course, or several runs side by side.

Everything comes from what a run leaves behind (events, configuration, panels, evaluation), so a report needs neither
images nor weights, and a run that is still going, or was cut short, has one too.
"""

from irkd_dist.report.live import live
from irkd_dist.report.maps import overlay
from irkd_dist.report.page import write

__all__ = ["live", "overlay", "write"]
