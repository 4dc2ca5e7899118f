"""Reports: a page about compressed models (`tersor report`), and pictures of forecasts.

tersor.report.read("report.html")       # what the page says, as plain values
"""

from tersor.report.data import read as read
