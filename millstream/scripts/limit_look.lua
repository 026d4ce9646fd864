-- limit_look: a meter as it is now, for people. Writes nothing.
--
-- KEYS  1 to 11 as _meter says
-- ARGV  none
-- Returns {requests in use, their limit, tokens in use, their limit, streams in use, their limit, waiting in interactive,
-- waiting in batch, ms of a window, now (ms), when the next is due (ms, 0: nobody waits), cooling until (ms, 0: it is not),
-- tokens an answer takes}; a limit of 0 is none. All of it 0 when there is no such meter.
-- flags: allow-oom
-- uses: _meter

open_meter(nil, true)
if m.window == 0 then
  return {0, 0, 0, 0, 0, 0, 0, 0, 0, now, 0, 0, 0}
end
read_seldom()
local rpm, tpm = limits()
local waits = {[0] = call('ZCARD', LINES[0]), call('ZCARD', LINES[1])}
local next_due = 0
for lane = 0, 1 do
  local member = call('ZRANGE', LINES[lane], 0, 0)[1]
  if member and next_due == 0 then
    local _, at = blocked(lane, tonumber(string.match(member, '%d+$')), rpm, tpm)
    next_due = at or now
  end
end
return {m.r, floor(rpm), m.t, floor(tpm), running, m.streams, waits[0], waits[1], m.window, now,
  floor(next_due), m.cooling > now and m.cooling or 0, floor(m.mean)}
