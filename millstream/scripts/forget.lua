-- forget: let Redis drop a finished job soon; who still reads it has the time given.
--
-- KEYS  1 state  2 log  3 spec
-- ARGV  1 ms it stays (60,000)  2 ms it stays when nobody is subscribed to its channel (the same, or 0: dropped now)
-- Returns {'forgotten'}  {'open', status}  {'unknown'}
-- Called twice, a job that is dropped now is `unknown` the second time.
-- flags: allow-oom
-- uses: _ending

local status = redis.call('HGET', KEYS[1], 'status')
if not status then
  return {'unknown'}
end
if not CLOSED[status] then
  return {'open', status}
end

-- A pattern may be anybody's, this job's follower included. Where the ACL does not allow to ask, somebody may follow.
local function followed()
  local own = redis.pcall('PUBSUB', 'NUMSUB', string.sub(KEYS[2], 1, -4) .. 'chunks')
  local patterns = redis.pcall('PUBSUB', 'NUMPAT')
  return own.err or type(patterns) == 'table' or own[2] > 0 or patterns > 0
end

local stays = ARGV[1]
if ARGV[2] ~= stays and not followed() then
  stays = ARGV[2]
end
if redis.call('PTTL', KEYS[1]) > tonumber(stays) then
  for i = 1, 3 do
    redis.call('PEXPIRE', KEYS[i], stays) -- 0 deletes
  end
end
return {'forgotten'}
