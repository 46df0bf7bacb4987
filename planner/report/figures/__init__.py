"""The pages' figures, drawn by matplotlib as SVG that follows the page's colours."""
