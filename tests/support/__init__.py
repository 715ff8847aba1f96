"""What more than one test file needs: networks, graphs, command lines, pages."""
