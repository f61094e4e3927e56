"""``mimdet parity``: numerical parity of every implementation, on any machine.

``cases`` lists what is compared, ``run`` compares it, ``report`` writes the results, ``compare`` sets two of them side
by side, ``pytest_plugin`` makes them tests. Importing this package, or the plugin, loads neither torch nor numpy.
"""
