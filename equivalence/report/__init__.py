"""How a run is shown: as text, on the terminal, as JSON and as HTML. Listeners of events; they decide nothing."""
