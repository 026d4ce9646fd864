-- limit_renew: keep tickets whose requests still run.
--
-- KEYS  1 to 11 as _meter says
-- ARGV  1 lease (ms)  then tickets
-- Returns how many had run out; they hold their streams again, while what they had reserved stays counted as used.
-- A lost reply may be retried.
-- flags: allow-oom
-- uses: _meter

local lease = tonumber(ARGV[1])
open_meter()
local lost = 0
for i = 2, #ARGV do
  if call('HSETNX', HELD, ARGV[i], '0:0:0') == 1 then
    lost = lost + 1
  end
  call('ZADD', TICKETS, now + lease, ARGV[i])
end
call('PEXPIRE', TICKETS, lease + max(m.window, 60000))
call('PEXPIRE', HELD, lease + max(m.window, 60000))
save_meter()
return lost
