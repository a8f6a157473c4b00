-- wrk sends one prepared request after another from a file with one JSON body a line, and prints the run as JSON.
-- Arguments: the file of bodies, the index at which this run starts (so that runs do not all begin alike).

local requests = {}
local position = 0

function init(args)
  local headers = { ["Content-Type"] = "application/json" }
  for line in io.lines(args[1]) do
    requests[#requests + 1] = wrk.format("POST", nil, headers, line)
  end
  position = tonumber(args[2] or "0")
end

function request()
  position = position % #requests + 1
  return requests[position]
end

function done(summary, latency, _)
  local errors = summary.errors
  io.write(string.format(
    '{"requests": %d, "microseconds": %d, "mean": %.1f, "p50": %d, "p90": %d, "p99": %d, "worst": %d, "faults": ',
    summary.requests, summary.duration,
    latency.mean, latency:percentile(50), latency:percentile(90), latency:percentile(99), latency.max))
  io.write(string.format(
    '{"status over 399": %d, "the connection was lost": %d, "no connection": %d, "no reply in 20 s": %d}}\n',
    errors.status, errors.read + errors.write, errors.connect, errors.timeout))
end
