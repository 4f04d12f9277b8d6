"""The page of a comparison: one HTML file that needs no network.

Its charts are drawn by Plotly's basic bundle, which lies in ``library/`` as npm has it (``VERSION`` says which one). Of what is well kept
it is the one that brings error bars, bars with names, logarithmic axes and values under the pointer, and a company releases it several
times a year. µPlot is a twentieth of its 1.2 MB, and leaves all of these to be drawn by hand; Vega-Lite is as large, with the Vega that it
needs, and compiles each chart before it is drawn.
"""
